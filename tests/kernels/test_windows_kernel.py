"""Windows and their books: the plain function here, the kernel in Triton's interpreter (a process of its own) and on a
GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from lit_parallel.kernels.windows import Windows, advance
from lit_parallel.solution import Status
from lit_parallel.solvers import GSJacobi, SolverLoop, Stopping
from lit_parallel.systems import TensorSystem, select, write

NAN, INF = float("nan"), float("inf")


class Toy(TensorSystem):
    """x_t = b_t + 1 where the pixels to the left and above are large, on images; not a number where ``bad`` says."""

    def __init__(self, batch, height, width, rows):
        length = height * width
        super().__init__(torch.zeros(batch, length))
        self.width, self.rows, self.height = width, rows, height
        self.b = torch.randint(0, 3, (batch, length)).float()
        self.bad = torch.rand(batch, length) < 3 / length
        self.bad[::2] = False

    def function(self, x):
        left = torch.nn.functional.pad(x, (1, 0))[:, :-1]
        above = torch.nn.functional.pad(x, (self.width, 0))[:, : -self.width]
        new = self.b + (left + above > 2)
        return torch.where(self.bad & (left > 1), NAN, new)

    def evaluate(self, state, equations, frontier, running):
        top = (frontier // (4 * self.width) * 4).clamp(max=self.height - self.rows)
        window = top[:, None] * self.width + torch.arange(self.rows * self.width)
        new = select(self.function(state), window)
        return write(state, window, new, select(self.guess, window), running)


def check_against_the_loop(device: str) -> None:
    torch.manual_seed(0)
    for height, width, rows, batch, slots in ((12, 5, 4, 7, 3), (12, 5, 8, 5, 5), (6, 4, 6, 3, 2), (4, 1, 4, 2, 4)):
        system = Toy(batch, height, width, rows)
        for most in (None, 6):
            loop = SolverLoop(system, GSJacobi(rows * width), Stopping(max_iterations=most), record_residual=True)
            expected = loop.run()
            windows = Windows(
                batch, slots, height, width, rows, limit=most, record_residual=True, device=torch.device(device)
            )
            for _again in range(2):
                x = solve_by_windows(system, windows, device)
                books = windows.books
                assert torch.equal(x, expected.value)
                assert books.iterations.tolist() == expected.iterations.tolist()
                assert books.evaluations.tolist() == expected.evaluations.tolist()
                assert books.frontier.tolist() == expected.frontier.tolist()
                assert books.changed_in.tolist() == expected.final_iteration.tolist()
                assert books.failed.tolist() == [status is Status.NON_FINITE for status in expected.status]
                residual = books.residual.cpu()
                assert torch.equal(residual[: len(expected.residual)], expected.residual)
                assert (residual[len(expected.residual) :] == 0).all()
                windows.reset()
            if height == 12:  # the toy is worth the trouble
                assert expected.iterations.unique().numel() > (most is None)
                assert (most is None) == (Status.CONVERGED in expected.status)
                assert Status.NON_FINITE in expected.status


def solve_by_windows(system, windows, device):
    """What an engine does: evaluate every slot's window, note what changed."""
    x = system.guess.clone()
    for step in range(1000):
        owners, tops = windows.sample.tolist(), windows.top.tolist()
        busy = [owner for owner in owners if owner >= 0]
        assert len(busy) == len(set(busy))
        change = torch.full((windows.slots, windows.pixels), NAN)  # of an idle slot: it does not matter
        for slot, (owner, top) in enumerate(zip(owners, tops, strict=True)):
            if owner >= 0:
                begin = top * windows.width
                window = slice(begin, begin + windows.pixels)
                new = system.function(x)[owner, window]
                finite = new.isfinite()
                new = torch.where(finite, new, system.guess[owner, window])
                change[slot] = torch.where(finite, (new - x[owner, window]).abs(), NAN)
                x[owner, window] = new
        advance(windows, change.to(device))
        assert int(windows.step) == step + 1
        assert int(windows.progress) // 2 == step + 1
        done = int(windows.progress) % 2 == 1
        assert done == (max(windows.sample.tolist()) < 0)
        if done:
            assert int(windows.finished) == windows.batch
            return x
    raise AssertionError("not finished")


def check_known_by_hand(device: str) -> None:
    """Four images of 8 x 2 pixels, two in work at a time, windows of 4 rows, at most 3 iterations."""
    windows = Windows(4, 2, 8, 2, 4, limit=3, record_residual=True, device=torch.device(device))
    beginning = windows._numbers.clone()

    def step(first, second):
        change = torch.zeros(2, 8)
        for row, some in zip(change, (first, second), strict=True):
            for place, moved in some.items():
                row[place] = moved
        advance(windows, change.to(device))
        return windows.sample.tolist(), windows.top.tolist(), windows.frontier.tolist(), int(windows.progress)

    assert windows.sample.tolist() == [0, 1]
    # Sample 0: nothing changes, the window moves on. Sample 1: its first equation is not finite.
    assert step({}, {0: NAN, 2: 1.0}) == ([0, 2], [4, 0], [8, 0, 0, 0], 2)
    # Sample 0: equation 11 changes, what is behind it may be at fault for anything. Sample 2 begins.
    assert step({3: 2.0, 5: NAN, 6: 0.5}, {5: 0.5, 6: 3.0}) == ([0, 2], [4, 0], [12, 0, 6, 0], 4)
    # Sample 0 ends in its third iteration; sample 2 has equation 6 from final inputs, and fails.
    assert step({}, {6: NAN}) == ([3, -1], [0, 0], [16, 0, 6, 0], 6)
    # Sample 3 alone, until the limit.
    for iteration in (1, 2):
        everything = dict.fromkeys(range(8), 4.0 - iteration)
        assert step(everything, {0: NAN})[:3] == ([3, -1], [0, 0], [16, 0, 6, iteration])
    assert step({2: 1e-30}, {0: NAN}) == ([-1, -1], [0, 0], [16, 0, 6, 3], 13)
    # An iteration too many, as the host may launch, changes nothing but the count of steps.
    assert step({0: 1.0}, {0: NAN}) == ([-1, -1], [0, 0], [16, 0, 6, 3], 15)

    assert windows.failed.tolist() == [0, 1, 1, 0]
    assert windows.iterations.tolist() == [3, 1, 2, 3]
    assert windows.evaluations.tolist() == [24, 8, 16, 24]
    assert windows.finished.tolist() == [4]
    assert windows.changed_in.tolist() == [
        [0] * 11 + [2, 0, 2, 2, 0],
        [1, 0, 1] + [0] * 13,
        [0] * 5 + [1, 2] + [0] * 9,
        [1, 2, 3] + [2] * 5 + [0] * 8,
    ]
    expected = torch.tensor([[0, INF, 3, 3], [INF, 0, INF, 2], [0, 0, 0, 1e-30]])
    assert torch.equal(windows.residual.cpu(), expected)
    windows.reset()
    assert torch.equal(windows._numbers, beginning)
    assert (windows.residual == 0).all()


def check_many_that_end_at_once(device: str) -> None:
    windows = Windows(100, 40, 4, 2, 4, device=torch.device(device))
    change = torch.zeros(40, 8, device=device)
    for step in range(3):
        assert sorted(set(windows.sample.tolist()) - {-1}) == list(range(100))[40 * step :][:40]
        advance(windows, change)
        assert int(windows.finished) == min(100, 40 * (step + 1))
        assert int(windows.progress) == 2 * (step + 1) + (step == 2)
    assert windows.frontier.tolist() == [8] * 100
    assert windows.iterations.tolist() == [1] * 100


def check_all(device: str) -> None:
    check_known_by_hand(device)
    check_against_the_loop(device)
    check_many_that_end_at_once(device)


def test_the_plain_function():
    check_all("cpu")


def test_kernel_in_the_interpreter():
    # TRITON_INTERPRET counts only before triton is imported, hence another process.
    code = "import test_windows_kernel as t; t.check_all('cpu'); print('agreed')"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agreed" in done.stdout


@pytest.mark.gpu
def test_kernel_on_the_gpu():
    check_all("cuda")


def test_a_window_is_a_multiple_of_four_rows_or_the_whole_image():
    assert Windows(1, 1, 6, 3, 6).pixels == 18
    for rows in (0, 3, 16):
        with pytest.raises(ValueError, match=f"not {rows}"):
            Windows(1, 1, 14, 3, rows)
