"""Drawing pixels: the plain function here, the kernel in Triton's interpreter (a process of its own) and on a GPU."""

import os
import subprocess
import sys
from itertools import product

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from lit_parallel.conditionals import Categorical, DiscretizedLogisticMixture
from lit_parallel.kernels.mixture import COUPLINGS, covers, draw
from lit_parallel.kernels.windows import Windows
from lit_parallel.systems import write

NAN = float("nan")
PITCH, FEATURES = 192, 8


def random_parameters(conditional, count):
    """Sharp and flat, inside and outside of the levels; what lies beyond them is not to be read."""
    parameters = torch.full((count, PITCH), NAN)
    mixtures = conditional.mixtures
    own = torch.randn(count, conditional.num_parameters)
    own[:, :mixtures] *= 2
    parts = own[:, mixtures:].unflatten(1, (conditional.channels, -1, mixtures))
    parts[:, :, 1] = 11 * torch.rand_like(parts[:, :, 1]) - 9  # from below the smallest log-scale
    parameters[:, : conditional.num_parameters] = own
    return parameters


class Problem:
    """Three images of some rows of 2 pixels; slots work on the last, on none, and on the first."""

    width, batch = 2, 3
    samples = (2, -1, 0)

    def __init__(self, channels, mixtures, coupling, with_given, height=8):
        self.height = height
        self.conditional = DiscretizedLogisticMixture(channels, mixtures)
        self.coupling, self.length = coupling, self.height * self.width
        shape = (self.batch, self.length, channels)
        generator = np.random.default_rng(0)
        noise = [self.conditional.draw_noise(generator, self.length, coupling) for _ in range(self.batch)]
        self.noise = torch.from_numpy(np.stack(noise)).float()
        self.x = torch.randint(0, 256, shape).float()
        self.guess = torch.randint(0, 256, shape).float()
        self.given = torch.rand(shape) < 0.2 if with_given else None
        self.image = torch.zeros(self.batch, 2 + self.height, self.width + 2, FEATURES)
        self.image[:, 2:, 1:-1, channels] = 1  # the network's channel of ones
        self.image[:, 2:, 1:-1, :channels] = self.conditional.encode(self.x).unflatten(1, (self.height, self.width))

    def windows(self, rows, tops, device, samples=samples):
        windows = Windows(self.batch, len(samples), self.height, self.width, rows, device=torch.device(device))
        windows.sample.copy_(torch.tensor(samples))
        windows.top.copy_(torch.tensor(tops))
        return windows

    def run(self, device, parameters, windows, temperature, rows, columns, **how):
        """The kernel's iterate, image and change."""
        tensors = (parameters, self.x, self.image, torch.full((windows.slots, rows * columns), 7.0))
        tensors = tuple(tensor.to(device).clone() for tensor in tensors)
        given = None if self.given is None else self.given.to(device)
        mixture = (self.conditional.channels, self.conditional.mixtures)
        draw(
            *tensors, self.noise.to(device), self.guess.to(device), given, windows, mixture, self.coupling,
            temperature, rows, columns, self.height, self.width, **how,
        )  # fmt: skip
        return tuple(tensor.cpu() for tensor in tensors[1:])

    def agrees(self, expected, x, image):
        """Whether an iterate is as expected, and the image shows it."""
        assert torch.equal(x.nan_to_num(nan=-1), expected.nan_to_num(nan=-1))
        shown = self.image.clone()
        encoded = self.conditional.encode(expected.nan_to_num(nan=0)).unflatten(1, (self.height, self.width))
        shown[:, 2:, 1:-1, : self.conditional.channels] = encoded
        assert torch.equal(image, shown)


def check_windows(device: str) -> None:
    """One evaluation as the solver's, by the conditional's own sampling and the system's own writing."""
    torch.manual_seed(0)
    rows, tops = 4, (4, 0, 0)
    kinds = ((1, 3, 0.7), (3, 10, 1.0), (3, 10, 0.7))
    for coupling, (channels, mixtures, temperature) in product(COUPLINGS, kinds):
        problem = Problem(channels, mixtures, coupling, with_given=temperature != 1)
        conditional, pixels = problem.conditional, rows * problem.width
        parameters = random_parameters(conditional, 3 * pixels)
        parameters[[1, 2 * pixels + 5], [0, conditional.num_parameters - 1]] = torch.tensor([NAN, float("inf")])
        windows = problem.windows(rows, tops, device)
        x, image, change = problem.run(device, parameters, windows, temperature, rows, problem.width)

        expected, changes = problem.x.clone(), torch.zeros(3, pixels)
        for slot, sample in ((0, 2), (2, 0)):
            equations = tops[slot] * problem.width + torch.arange(pixels)
            new = conditional.sample(
                parameters.unflatten(0, (3, -1))[slot, :, : conditional.num_parameters],
                problem.noise[sample, equations], coupling, temperature,
            )  # fmt: skip
            guess = problem.guess[sample, equations]
            if problem.given is not None:
                new = torch.where(problem.given[sample, equations], guess, new)
            one = expected[sample : sample + 1]
            running = torch.ones(1, dtype=torch.bool)
            changes[slot] = write(one, equations, new[None], guess[None], running).change[0]
        assert changes.isnan().any()
        problem.agrees(expected, x, image)
        assert torch.equal(change.nan_to_num(nan=-1), changes.nan_to_num(nan=-1))
        assert windows.sample.tolist() == list(problem.samples)
        assert (windows.top.tolist(), windows.left.tolist()) == (list(tops), [0, 0, 0])


def check_single_pixels(device: str) -> None:
    """A sweep pixel by pixel, all samples side by side; one of them goes astray."""
    torch.manual_seed(1)
    for coupling, channels in zip(COUPLINGS, (3, 1, 3), strict=True):
        problem = Problem(channels, 4, coupling, with_given=True, height=4)
        problem.given[1, 7] = torch.arange(channels) == 1
        conditional = problem.conditional
        windows = problem.windows(4, (0, 0, 0), device, samples=(0, 1, 2))
        for equation in range(problem.length):
            parameters = random_parameters(conditional, 3)
            if equation == 7:
                parameters[1, 2] = NAN
            new = conditional.sample(
                parameters[:, : conditional.num_parameters], problem.noise[:, equation], coupling, 1.0
            )
            assert windows.top.tolist() == [equation // problem.width] * 3
            assert windows.left.tolist() == [equation % problem.width] * 3
            x, image, change = problem.run(device, parameters, windows, 1.0, 1, 1, solve=False, next_pixel=True)
            expected = problem.x.clone()
            expected[:, equation] = torch.where(problem.given[:, equation], problem.guess[:, equation], new)
            problem.agrees(expected, x, image)
            problem.x, problem.image = x, image
            assert (change == 7).all()
        lost = problem.x.isnan().any(dim=2).nonzero().tolist()
        assert lost == [[1, 7]]
        # One pixel too many, as the host may launch, is not drawn.
        before = problem.x.nan_to_num(nan=-1)
        x, _, _ = problem.run(device, parameters, windows, 1.0, 1, 1, solve=False, next_pixel=True)
        assert torch.equal(x.nan_to_num(nan=-1), before)
        assert windows.top.tolist() == [problem.height] * 3
        _, _, change = problem.run(device, parameters, windows, 1.0, 1, 1)
        assert (change == 0).all()


def check_probabilities(device: str) -> None:
    """Uniform noise just inside the edges of a level gives this level: 5e-5 of probability are not lost anywhere."""
    torch.manual_seed(2)
    for channels, mixtures, temperature in ((1, 10, 1.0), (3, 5, 1.0), (3, 16, 0.7), (3, 10, 3.0)):
        problem = Problem(channels, mixtures, "inverse_cdf", with_given=False)
        conditional, pixels = problem.conditional, problem.length
        parameters = random_parameters(conditional, pixels)
        listing = conditional.probabilities(parameters[:, : conditional.num_parameters].double())
        table, levels = next(listing), []
        for channel in range(channels):
            table = (table / table.amax(dim=1, keepdim=True)) ** (1 / temperature)
            cumulated = (table / table.sum(dim=1, keepdim=True)).cumsum(dim=1)
            likely = (table / table.sum(dim=1, keepdim=True)).clamp(max=0.1) * (table > 1e-3 * table.sum(1, True))
            level = likely.multinomial(1)
            level[::5] = likely[::5].shape[1] - 1 - likely[::5].flip(1).gt(0).int().argmax(1, True)  # the last
            level[1::5] = likely[1::5].gt(0).int().argmax(1, True)  # the first
            end, begin = cumulated.gather(1, level), torch.nn.functional.pad(cumulated, (1, 0)).gather(1, level)
            upper = torch.arange(pixels)[:, None] // 5 % 2 == 0
            u = torch.where(upper, end - 5e-5, begin + 5e-5)
            problem.noise[0, :, channel] = u[:, 0].float().clamp(0, 1 - 2.0**-24)
            levels.append(level[:, 0])
            if channel + 1 < channels:
                table = listing.send(levels[-1].double())
        windows = problem.windows(problem.height, (0,), device, samples=(0,))
        x, _, _ = problem.run(device, parameters, windows, temperature, problem.height, problem.width)
        assert torch.equal(x[0].long(), torch.stack(levels, dim=1))


def check_all(device: str) -> None:
    check_windows(device)
    check_single_pixels(device)
    check_probabilities(device)


def test_the_plain_function():
    check_all("cpu")


def test_kernel_in_the_interpreter():
    # TRITON_INTERPRET counts only before triton is imported, hence another process.
    code = "import test_mixture_kernel as t; t.check_all('cpu'); print('agreed')"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "agreed" in done.stdout


@pytest.mark.gpu
def test_kernel_on_the_gpu():
    check_all("cuda")


def test_what_is_covered():
    mixture = DiscretizedLogisticMixture(3, 10)
    assert all(covers(mixture, coupling, torch.float32) for coupling in ("gumbel", "inverse_cdf", "mixture_8bit"))
    assert not covers(mixture, "paper", torch.float32)
    assert not covers(mixture, "gumbel", torch.float64)
    assert not covers(DiscretizedLogisticMixture(3, 17), "gumbel", torch.float32)
    assert not covers(Categorical(), "gumbel", torch.float32)


def test_only_a_window_of_one_pixel_moves_on_by_one():
    problem = Problem(1, 3, "gumbel", with_given=False)
    windows = problem.windows(8, (0, 0, 0), "cpu")
    with pytest.raises(ValueError, match="only a window of one pixel"):
        problem.run("cpu", random_parameters(problem.conditional, 3), windows, 1.0, 1, 2, next_pixel=True)
