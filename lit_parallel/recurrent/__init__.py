"""Backpropagation through recurrent layers, parallel in time."""

from lit_parallel.recurrent.controller import BackwardRecord
from lit_parallel.recurrent.options import RecurrentOptions
from lit_parallel.recurrent.swap import parallelize, records, restore

__all__ = ["BackwardRecord", "RecurrentOptions", "parallelize", "records", "restore"]
