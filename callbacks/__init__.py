"""What a Trainer plugs in; the mathematics lives in lit_parallel."""

from callbacks.build import build_training_callbacks
from callbacks.jacobi_backprop import JacobiBackprop
from callbacks.sample_grid import SampleGrid

__all__ = ["JacobiBackprop", "SampleGrid", "build_training_callbacks"]
