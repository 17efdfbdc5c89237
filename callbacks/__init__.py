"""What a Trainer plugs in; the mathematics lives in lit_parallel."""

from callbacks.best_checkpoint import BestCheckpoint
from callbacks.build import build_testing_callbacks, build_training_callbacks
from callbacks.jacobi_backprop import JacobiBackprop
from callbacks.jacobi_evaluation import JacobiEvaluation
from callbacks.last_checkpoint import LastCheckpoint
from callbacks.sample_grid import SampleGrid
from callbacks.seeded_steps import SeededSteps
from callbacks.stop_at_non_finite import StopAtNonFinite
from callbacks.stop_early import StopEarly

__all__ = [
    "BestCheckpoint",
    "JacobiBackprop",
    "JacobiEvaluation",
    "LastCheckpoint",
    "SampleGrid",
    "SeededSteps",
    "StopAtNonFinite",
    "StopEarly",
    "build_testing_callbacks",
    "build_training_callbacks",
]
