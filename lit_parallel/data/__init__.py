"""Image datasets as LightningDataModules."""
