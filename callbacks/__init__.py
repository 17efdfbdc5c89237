"""What a Trainer plugs in; the mathematics lives in lit_parallel."""

from callbacks.build import build_training_callbacks
from callbacks.sample_grid import SampleGrid

__all__ = ["SampleGrid", "build_training_callbacks"]
