"""Trajectories in, packed rows of tokens out: template, packing, batch, datamodule."""
