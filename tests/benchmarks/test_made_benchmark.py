"""The benchmark's measurements on a tiny model: it must run, and compare what it says it compares."""

import argparse

import torch

from benchmarks.made import measure, print_rows
from lit_parallel.modules.made import MadeModule
from lit_parallel.modules.options import MadeOptions


def test_every_method_is_measured_and_compared(capsys):
    model = MadeModule(MadeOptions(hidden_sizes=[16, 16]), (1, 6, 6))
    args = argparse.Namespace(samples=4, seed=0, repeats=2, window=None, kernel_windows=[64])
    rows = measure(model, args, torch.device("cpu"))
    by_method = {row["method"]: row for row in rows}
    assert {"sequential, eager", "cached sequential, eager", "Jacobi, eager"} <= by_method.keys()
    certified = [row for row in rows if row["certificate_iterations_max"] > 0]
    assert len(certified) == 3
    assert all(row["bitwise_equal_to_sequential_eager"] and row["certified"] for row in certified)
    sequential, jacobi = by_method["sequential, eager"], by_method["Jacobi, eager"]
    assert sequential["iterations_max"] == 36
    assert jacobi["speedup over sequential, eager"] == sequential["seconds"] / jacobi["seconds"]
    assert len(jacobi["seconds_of_runs"]) == 2
    print_rows("tiny", rows)
    assert "cached sequential" in capsys.readouterr().out
