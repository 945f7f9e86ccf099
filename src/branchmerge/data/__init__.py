"""From trajectories to packed rows of tokens: template, packing, batch, datamodule."""
