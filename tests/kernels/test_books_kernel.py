"""The bookkeeping kernels: the solvers' own tests once more, with the kernels in Triton's interpreter and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

TESTS = Path(__file__).parent.parent


def test_the_solvers_tests_hold_with_the_kernels_interpreted():
    # TRITON_INTERPRET counts only before triton is imported, hence another process.
    chosen = "jacobi or known_by_hand or non_finite or tolerance or limit or residual or fast_path or nilpotent"
    command = [sys.executable, "-m", "pytest", "-x", "-W", "ignore::RuntimeWarning", "-k", chosen, TESTS / "solvers"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 7, 1500])
def test_graphed_solves_on_a_gpu_agree_with_the_cpu(dtype, length):
    from lit_parallel.solvers import GSJacobi, Jacobi, JacobiGS, Sequential, Stopping, solve
    from lit_parallel.systems import TensorSystem

    class Tridiagonal(TensorSystem):
        """x_t = 0.5 x_{t-1} + 0.25 x_{t-2} + b_t: every operation rounds the same on both devices."""

        def __init__(self, b):
            super().__init__(torch.zeros_like(b))
            self.b = b

        def function(self, x):
            one = torch.nn.functional.pad(x, (1, 0))[:, :-1]
            two = torch.nn.functional.pad(x, (2, 0))[:, :-2]
            return 0.5 * one + 0.25 * two + self.b

    b = torch.randn(5, length, dtype=dtype)
    b[3, length // 2] = float("nan")  # one sample fails
    for solver in (Jacobi(), GSJacobi(13), JacobiGS(5), Sequential()):
        for stopping in (Stopping(), Stopping(absolute_tolerance=1e-3), Stopping(max_iterations=3)):
            for graph in (True, False):
                ours = solve(
                    Tridiagonal(b.cuda()), solver, stopping, certify=True, record_residual=True, cuda_graph=graph
                ).cpu()
                plain = solve(Tridiagonal(b), solver, stopping, certify=True, record_residual=True)
                assert ours.status == plain.status
                assert torch.equal(ours.value, plain.value)
                for name in ("iterations", "evaluations", "frontier", "certified", "certificate_iterations"):
                    assert torch.equal(getattr(ours, name), getattr(plain, name)), (name, solver.name, stopping)
                if ours.residual is not None:
                    assert torch.equal(ours.residual, plain.residual)
                    assert torch.equal(ours.final_iteration, plain.final_iteration)
