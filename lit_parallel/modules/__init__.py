"""LightningModules: models that can be trained here and sampled by any solver."""
