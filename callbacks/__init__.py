"""What a Trainer plugs in; the mathematics lives in lit_parallel."""

from callbacks.build import build_testing_callbacks, build_training_callbacks
from callbacks.jacobi_backprop import JacobiBackprop
from callbacks.jacobi_evaluation import JacobiEvaluation
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.sample_grid import SampleGrid

__all__ = [
    "JacobiBackprop",
    "JacobiEvaluation",
    "LastCheckpoint",
    "SampleGrid",
    "build_testing_callbacks",
    "build_training_callbacks",
]
