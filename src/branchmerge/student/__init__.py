"""The student: its backbone, packed attention, loss, LightningModule, optimizer, export; `training` runs a branch."""
