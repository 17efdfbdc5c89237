"""The kernel against the plain systems, in Triton's interpreter (a process of its own) and on a GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")


def check_against_plain(device: str) -> None:
    from lit_parallel.networks import MADE
    from lit_parallel.sampling.made import FoldedMADE, MadeSystem
    from lit_parallel.sampling.made_fused import FusedMadeSystem
    from lit_parallel.sampling.noise import logistic_noise
    from lit_parallel.solution import Status
    from lit_parallel.solvers import GSJacobi, Jacobi, SolverLoop, Stopping, solve

    torch.manual_seed(0)
    for length, hidden, window, degrees in (
        (22, (12, 9), 8, "spaced"),
        (11, (17, 14), 4, "random"),
        (9, (6, 7), 1, "spaced"),
        (9, (6, 7), 2, "random"),
        (5, (3, 4), 16, "spaced"),
        (1, (2, 2), 4, "spaced"),
    ):
        network = MADE(length, hidden, order="random", degrees=degrees).to(device)
        for parameter in network.parameters():
            parameter.data *= 2.0
        folded = FoldedMADE.from_module(network)
        noise = logistic_noise(3, list(range(4)), length).to(device, torch.float32)
        plain = solve(MadeSystem(folded, noise, 6.0), Jacobi())
        system = FusedMadeSystem(folded, noise, 6.0)
        loop = SolverLoop(system, GSJacobi(window), record_residual=True)
        solution = loop.run()
        assert system._kernel is not None
        assert solution.status == [Status.CONVERGED] * 4
        torch.testing.assert_close(solution.value, plain.value, rtol=1e-4, atol=1e-4)
        assert (solution.frontier == length).all()
        # Every window needs at least one iteration, and at most one for each of its equations.
        windows = -(-length // min(window, length))
        assert (solution.iterations >= windows).all()
        assert (solution.iterations <= length).all()
        assert (solution.evaluations >= length).all()
        assert solution.residual is not None
        assert solution.residual.shape[0] == int(solution.iterations.max())
        assert float(solution.residual[0].min()) > 0
        assert solution.final_iteration is not None
        assert (solution.final_iteration.amax(dim=1) <= solution.iterations).all()
        # Again, with other noise, from the same loop; and certified bit for bit.
        noise.neg_()
        again = loop.run()
        certified = SolverLoop(FusedMadeSystem(folded, noise, 6.0), GSJacobi(window), certify=True).run()
        exact = solve(MadeSystem(folded, noise, 6.0), Jacobi()).value
        assert certified.certified.all()
        assert torch.equal(certified.value, exact)
        torch.testing.assert_close(again.value, exact, rtol=1e-4, atol=1e-4)

        if length > 20:
            # Pictures of the iterates come from the PyTorch evaluation; the kernel's are never seen.
            seen = []
            solve(
                FusedMadeSystem(folded, noise, 6.0), GSJacobi(window), observer=lambda k, x, seen=seen: seen.append(k)
            )
            assert len(seen) > 3
            with pytest.raises(ValueError, match="make a new loop"):
                loop.run(observer=lambda k, x: None)
            # A window that the kernel does not take is not changed silently.
            wide = FusedMadeSystem(folded, noise, 6.0)
            torch.testing.assert_close(solve(wide, GSJacobi(12)).value, exact, rtol=1e-4, atol=1e-4)
            assert wide._kernel is None

            stopped = solve(FusedMadeSystem(folded, noise, 6.0), GSJacobi(window), Stopping(max_iterations=4))
            assert stopped.status == [Status.ITERATION_LIMIT] * 4
            assert (stopped.iterations == 4).all()
            for sample, frontier in enumerate(stopped.frontier.tolist()):
                assert 4 <= frontier < length
                torch.testing.assert_close(
                    stopped.value[sample, :frontier], exact[sample, :frontier], rtol=1e-4, atol=1e-4
                )
            # One sample whose noise is not a number from equation 9 on fails there, alone.
            noise[2, 9] = float("nan")
            failed = solve(FusedMadeSystem(folded, noise, 6.0), GSJacobi(window), certify=True)
            assert [status is Status.CONVERGED for status in failed.status] == [True, True, False, True]
            assert failed.status[2] is Status.NON_FINITE
            assert failed.frontier.tolist() == [length, length, 9, length]
            others = [0, 1, 3]
            assert torch.equal(failed.value[others], exact[others])
            assert failed.value.isfinite().all()


def test_kernel_in_the_interpreter():
    # TRITON_INTERPRET counts only before triton is imported, hence another process.
    code = "import test_made_kernel as t; t.check_against_plain('cpu'); print('agreed')"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agreed" in done.stdout


@pytest.mark.gpu
def test_kernel_on_the_gpu():
    check_against_plain("cuda")
