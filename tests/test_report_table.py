"""The table that sampling prints is whole in a terminal of 80 columns."""

import math
import re

import pytest
import torch

from lit_parallel.report import _short, print_table
from lit_parallel.sampling.compare import Measurement
from lit_parallel.solution import Solution, Status


def measured(solver: str, iterations: int, seconds: float, difference: float | None) -> Measurement:
    solution = Solution(
        value=torch.zeros(2, 3072),
        status=[Status.CONVERGED] * 2,
        iterations=torch.tensor([iterations, iterations - 1]),
        evaluations=torch.tensor([3072 * 20] * 2),
        frontier=torch.full((2,), 3072),
        certified=torch.ones(2, dtype=torch.bool),
        certificate_iterations=torch.ones(2, dtype=torch.long),
        seconds=seconds,
        certificate_seconds=0.0,
        setup_seconds=0.0,
        length=3072,
        solver=solver,
    )
    equal = None if difference is None else difference == 0
    speedup = {"sequential": 12.3456, "cached_sequential": math.nan}
    return Measurement(solver, solution, [seconds], True, None, equal, difference, speedup)


def test_the_table_is_whole_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # to rich, this is a terminal
    monkeypatch.setenv("COLUMNS", "80")
    print_table(
        [measured("gs_jacobi", 479, 0.52481, 0.0), measured("cached_sequential", 3072, 1234.5, 9e-6)], title="what"
    )
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    lines = [line.split() for line in printed.splitlines() if "sequential" in line or "gs_jacobi" in line]
    assert ["gs_jacobi", "478.5/479+1", "6.41x", "21.0", "0.5248", "12.35x", "-", "yes"] in lines
    assert "3071.5/3072+1" in printed
    assert "no 9e-06" in printed


@pytest.mark.parametrize(
    ("number", "digits", "text"),
    [(0.52481, 4, "0.5248"), (1234.5, 4, "1234.5"), (123456.0, 2, "123456"), (21, 1, "21.0")],
)
def test_numbers_are_short_and_have_no_exponent(number, digits, text):
    assert _short(number, digits) == text
