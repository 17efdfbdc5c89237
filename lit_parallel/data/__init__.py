"""Datasets of images and sequences as LightningDataModules."""
