"""Sampling a network as a triangular system: the bits of a plain loop over pixels, whatever the solver."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.stats
import torch
from small_models import categorical, pixel_by_pixel, pixelcnnpp
from torch import nn
from torch.nn.utils import parametrize

from lit_parallel.conditionals import Categorical
from lit_parallel.errors import UserError
from lit_parallel.modules.conditional import ConditionalModule
from lit_parallel.sampling.autoregressive import Given, folded
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.sampling.sampler import Sampler, What, sample
from lit_parallel.solution import Status
from lit_parallel.solvers import Sequential, SolverLoop, SolverOptions

COUPLINGS = ["gumbel", "inverse_cdf", "mixture_8bit", "paper"]
SOLVERS = [
    SolverOptions(name="sequential"),
    SolverOptions(name="jacobi"),
    SolverOptions(name="jacobi_gs"),
    SolverOptions(name="jacobi_gs", block_size=5),
    SolverOptions(name="gs_jacobi"),
    SolverOptions(name="gs_jacobi", window=1),
    SolverOptions(name="gs_jacobi", window=11),
]
every_coupling = pytest.mark.parametrize("coupling", COUPLINGS)
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{s.name}-{s.block_size or s.window}")


def exact(options: SolverOptions) -> SolverOptions:
    """The same solver, stopped by equality also where the coupling is continuous."""
    return SolverOptions(options.name, options.block_size, options.window, absolute_tolerance=0.0)


def assert_solved(model, expected, images, solution, sequential=False):
    """The values and images of the plain loop, certified, in no more iterations than there are equations."""
    batch, channels, height, width = expected.shape
    assert torch.equal(solution.value, expected.permute(0, 2, 3, 1).reshape(batch, height * width, channels))
    assert torch.equal(images, expected.round().to(torch.uint8))
    assert solution.value.dtype == next(model.network.parameters()).dtype
    assert solution.status == [Status.CONVERGED] * batch
    assert (solution.iterations <= height * width).all()
    if not sequential:
        assert solution.certified.all()


# -- one seed, one image -------------------------------------------------------------------------------------------


@every_coupling
@pytest.mark.parametrize(("shape", "batch"), [((1, 4, 8), 3), ((3, 8, 4), 1)])
def test_every_solver_draws_the_bits_of_a_loop_over_pixels(coupling, shape, batch):
    model = pixelcnnpp(shape)
    expected = pixel_by_pixel(model, list(range(batch)), seed=5, coupling=coupling)
    assert len(expected.unique()) > 5
    for solver in SOLVERS if shape[0] == 1 else SOLVERS[1::2]:
        images, solution = sample(model, batch, solver=solver, seed=5, options=SamplingOptions(coupling))
        assert_solved(model, expected, images, solution, solver.name == "sequential")
        # The result of a tolerance was repaired, that of equality had nothing to repair; from caches, rounding differs.
        if coupling != "paper" and solver.name in ("jacobi", "jacobi_gs"):
            assert (solution.certificate_iterations == 1).all()


@every_solver
def test_labels_temperature_given_pixels_and_double_precision(solver):
    model = pixelcnnpp((3, 4, 8), num_classes=3, filters=3).double()
    given = torch.randint(0, 256, (2, 3, 4, 8), dtype=torch.uint8)
    mask = torch.rand(2, 4, 8) < 0.4
    expected = pixel_by_pixel(
        model,
        list(range(5)),
        temperature=0.7,
        given=given[[0, 1, 0, 1, 0]].double(),
        mask=mask[[0, 1, 0, 1, 0]],
    )
    options = SamplingOptions(temperature=0.7)
    images, solution = sample(model, 5, solver=solver, options=options, given=Given(given, mask))
    assert_solved(model, expected, images, solution, solver.name == "sequential")
    for i in range(5):
        assert torch.equal(images[i][:, mask[i % 2]], given[i % 2][:, mask[i % 2]])
        if solution.final_iteration is not None:
            final = solution.final_iteration[i].reshape(4, 8)
            assert (final[mask[i % 2]] == 0).all()
            assert (final[~mask[i % 2]] > 0).sum() > 8


@every_coupling
def test_every_coupling_takes_temperature_label_and_given_pixels(coupling):
    model = pixelcnnpp((1, 4, 8), num_classes=2)
    given, mask = torch.randint(0, 256, (1, 1, 4, 8), dtype=torch.uint8), torch.arange(32).reshape(4, 8) % 5 == 0
    how = {"coupling": coupling, "temperature": 1.3, "label": 1}

    def draw(solver, given=Given(given, mask), **other):  # noqa: B008
        return sample(model, 5, solver=solver, seed=2, options=SamplingOptions(**how | other), given=given)

    expected = pixel_by_pixel(
        model,
        list(range(5)),
        seed=2,
        **how,
        given=given.float().expand(5, -1, -1, -1),
        mask=mask.expand(5, -1, -1),
    )
    for solver in ("jacobi", "gs_jacobi"):
        assert_solved(model, expected, *draw(solver))
    images, _ = draw("jacobi")
    for other in ({"given": None}, {"temperature": 1.0}, {"label": 0}):
        assert not torch.equal(draw("jacobi", **other)[0], images)


@pytest.mark.parametrize("channels", [1, 3])
def test_these_problems_are_not_too_easy_and_jacobi_is_exact_from_the_front(channels):
    model = pixelcnnpp((channels, 8, 8))
    expected = pixel_by_pixel(model, [0, 1], coupling="inverse_cdf").permute(0, 2, 3, 1).flatten(1, 2)
    sampler = Sampler(model, "jacobi", 2, What(0, SamplingOptions("inverse_cdf")))
    iterates = []
    _, solution = sampler.batch([0, 1], observer=lambda k, x: iterates.append(x))
    for k, x in enumerate(iterates):
        assert torch.equal(x[:, :k], expected[:, :k])
    assert solution.iterations.min() > 4
    assert solution.iterations.max() < 64
    assert not torch.equal(iterates[4], expected)
    # The iteration map is when the iterates really stopped changing.
    last = torch.zeros(2, 64, dtype=torch.int64)
    for k, (before, after) in enumerate(itertools.pairwise(iterates), start=1):
        last[(before != after).any(dim=2)] = k
    assert torch.equal(solution.final_iteration.long(), last)
    assert torch.equal(sampler.pixel_map(solution).long(), last.reshape(2, 8, 8))


def test_blocks_are_rows_and_windows_eight_rows_unless_told_otherwise():
    model = pixelcnnpp((3, 12, 8))
    system = model.sampling_system(1, incremental=False)
    assert (system.length, system.block_size, system.window) == (96, 8, 64)
    by_channel = categorical((3, 2, 2), 2).sampling_system(1, incremental=False)
    assert (by_channel.length, by_channel.block_size, by_channel.window) == (12, 6, 12)


# -- the distribution ----------------------------------------------------------------------------------------------


def probabilities(model: ConditionalModule, temperature: float = 1.0, label: int | None = None):
    """All images as levels in order of generation ``[n, length]``, and their probabilities, by enumeration."""
    length, levels = model.positions.length, model.conditional.levels
    x = torch.cartesian_prod(*[torch.arange(levels)] * length)
    labels = [] if label is None else [torch.full((len(x),), label)]
    with torch.no_grad():
        steps = torch.softmax(model.network(x, *labels).double() / temperature, dim=-1)
    return x, steps.gather(2, x[..., None])[..., 0].prod(dim=1)


def assert_follow(images, probability, levels, cells=20):
    """Chi-square of the images' frequencies against probabilities in order of enumeration."""
    # Order of generation: rows, in a row pixels, in a pixel channels.
    x = (images.permute(0, 2, 3, 1).flatten(1).double() * ((levels - 1) / 255)).round().long()
    code = torch.zeros(len(x), dtype=torch.int64)
    for t in range(x.shape[1]):
        code = code * levels + x[:, t]
    counts = torch.bincount(code, minlength=len(probability))
    expected = probability * len(x)
    rare = expected < 5  # together one cell, as the test needs
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None].clamp(min=1e-9)])
    assert len(counts) > cells
    assert scipy.stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("coupling", ["gumbel", "inverse_cdf"])
@pytest.mark.parametrize(
    ("shape", "levels", "temperature"), [((1, 2, 2), 3, 1.0), ((3, 1, 2), 2, 1.0), ((1, 1, 4), 4, 0.6)]
)
def test_samples_follow_the_model_exactly(coupling, shape, levels, temperature):
    model = categorical(shape, levels)
    x, probability = probabilities(model, temperature)
    assert float(probability.sum()) == pytest.approx(1)
    options = SamplingOptions(coupling, temperature)
    images, solution = sample(model, 4000, solver="jacobi", seed=1, batch_size=2000, options=options)
    assert solution.certified.all()
    assert_follow(images, probability, levels)
    if temperature == 1:  # and so does the likelihood
        grey = (x * 255 / (levels - 1)).round().to(torch.uint8)
        every_image = grey.unflatten(1, (*shape[1:], shape[0])).permute(0, 3, 1, 2)
        with torch.no_grad():
            likelihood = model.log_likelihood(every_image, torch.rand(every_image.shape)).exp()
        torch.testing.assert_close(likelihood.double(), probability, rtol=1e-4, atol=1e-6)


def test_classes_are_sampled_in_turn_and_each_from_its_own_distribution():
    model = categorical((1, 2, 2), 3, num_classes=2)
    images, _ = sample(model, 6000, solver="gs_jacobi", seed=3, batch_size=3000)
    both = [probabilities(model, label=label)[1] for label in (0, 1)]
    assert (both[0] - both[1]).abs().sum() > 0.3
    for label in (0, 1):
        assert_follow(images[label::2], both[label], 3)
    only, _ = sample(model, 3000, solver="gs_jacobi", seed=3, batch_size=3000, options=SamplingOptions(label=1))
    assert_follow(only, both[1], 3)
    assert torch.equal(only[1::2], images[1:3000:2])


def test_what_follows_given_pixels_follows_the_model():
    model = categorical((1, 1, 4), 4)
    given = Given(torch.tensor([[[[170, 85, 0, 0]]]], dtype=torch.uint8), torch.tensor([[True, True, False, False]]))
    images, _ = sample(model, 6000, solver="jacobi", seed=4, batch_size=3000, given=given)
    x, probability = probabilities(model)
    fits = (x[:, 0] == 2) & (x[:, 1] == 1)
    assert_follow(images, torch.where(fits, probability / probability[fits].sum(), 0), 4, cells=12)


# -- which sample is which -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["sequential", "jacobi", "jacobi_gs", "gs_jacobi"])
def test_an_image_depends_on_its_index_and_on_nothing_else(solver):
    model = categorical((1, 4, 8), 4, num_classes=3)
    every_third = torch.arange(32).reshape(4, 8) % 3 == 0
    given = Given(torch.randint(0, 4, (2, 1, 4, 8), dtype=torch.uint8) * 85, every_third)
    full, _ = sample(model, 8, solver=solver, seed=4, batch_size=4, given=given)
    assert torch.equal(sample(model, 5, solver=solver, seed=4, batch_size=4, given=given)[0], full[:5])  # padded
    sampler = Sampler(model, solver, 4, What(4, given=given))
    for indices in ([7, 0, 3, 5], [6], [2, 1, 4]):
        images, _ = sampler.batch(indices)
        assert torch.equal(images, full[indices])
    assert len({image.numpy().tobytes() for image in full}) == 8
    assert not torch.equal(sample(model, 8, solver=solver, seed=5, batch_size=4, given=given)[0], full)
    for i, image in enumerate(full):
        assert torch.equal(image[:, every_third], given.images[i % 2][:, every_third])


def test_labels_cycle_by_the_index_of_the_sample():
    model = pixelcnnpp((1, 4, 4), num_classes=3)
    system = model.sampling_system(4, incremental=False)
    for indices in ([0, 1, 2, 3], [7, 5, 3, 8]):
        model.load_noise(system, 0, indices)
        assert system.labels.tolist() == [index % 3 for index in indices]
    fixed = model.sampling_system(2, incremental=False, options=SamplingOptions(label=2))
    model.load_noise(fixed, 0, [0, 1])
    assert fixed.labels.tolist() == [2, 2]


def test_a_new_batch_leaves_nothing_of_the_one_before():
    model = pixelcnnpp((1, 4, 8))
    mask = torch.zeros(2, 4, 8, dtype=torch.bool)
    mask[0, :2] = True
    given = Given(torch.randint(0, 256, (2, 1, 4, 8), dtype=torch.uint8), mask)
    sampler = Sampler(model, "jacobi", 1, What(given=given))
    with_given = sampler.batch([0])[0]
    without = sampler.batch([1])[0]  # its mask gives nothing
    assert (sampler.system.guess == 0).all()
    assert torch.equal(with_given[0, :, :2], given.images[0, :, :2])
    assert torch.equal(without, sample(model, 2, solver="sequential", batch_size=1)[0][1:])


# -- stopping ------------------------------------------------------------------------------------------------------


def test_the_paper_coupling_stops_at_a_hundredth_of_a_level_and_the_certificate_makes_it_exact():
    model = pixelcnnpp((3, 8, 8))
    options = SamplingOptions("paper")
    expected = pixel_by_pixel(model, [0, 1], coupling="paper").permute(0, 2, 3, 1).flatten(1, 2)

    def run(**how):
        return sample(model, 2, solver=SolverOptions(name="jacobi", **how), options=options)[1]

    settled = run(certify=False)
    assert settled.status == [Status.SETTLED] * 2
    assert not settled.certified.any()
    assert not torch.equal(settled.value, expected)
    certified = run()
    assert certified.status == [Status.CONVERGED] * 2
    assert certified.certified.all()
    assert (certified.certificate_iterations > 1).any()
    assert torch.equal(certified.value, expected)
    equality = run(certify=False, absolute_tolerance=0.0)
    assert equality.status == [Status.CONVERGED] * 2
    assert torch.equal(equality.value, expected)
    assert (equality.iterations > settled.iterations).all()
    assert (settled.value - expected).abs().max() < 1


@every_coupling
def test_no_tolerance_is_named_so_the_coupling_decides(coupling):
    model = pixelcnnpp((1, 4, 4))

    def tolerance(**how):
        return Sampler(model, SolverOptions(**how), 1, What(0, SamplingOptions(coupling))).loop.stopping

    assert tolerance().absolute_tolerance == (0.01 if coupling == "paper" else 0)
    assert tolerance().exact == (coupling != "paper")
    assert tolerance(absolute_tolerance=0.0).exact
    assert tolerance(absolute_tolerance=0.5).absolute_tolerance == 0.5


class Sick(nn.Module):
    """Gives not-a-number at one position of the samples of one class."""

    def __init__(self, network: nn.Module, position: int, label: int) -> None:
        super().__init__()
        self.network, self.position, self.label = network, position, label

    def forward(self, x, labels):
        output = self.network(x, labels)
        length = output.shape[1] if output.dim() == 3 else output.shape[2:].numel()
        here = torch.arange(length) == self.position
        if output.dim() == 3:
            where = (labels == self.label)[:, None, None] & here[None, :, None]
        else:
            where = (labels == self.label)[:, None, None, None] & here.reshape(output.shape[2:])
        return torch.where(where, float("nan"), output)


@every_solver
@pytest.mark.parametrize("kind", ["categorical", "pixelcnnpp"])
def test_a_sample_whose_parameters_are_not_finite_fails_alone(kind, solver):
    model = categorical((1, 4, 8), 5, num_classes=4) if kind == "categorical" else pixelcnnpp((1, 4, 8), num_classes=4)
    healthy, _ = sample(model, 4, solver="jacobi")
    model.network = Sick(model.network, position=6, label=2)
    images, solution = sample(model, 4, solver=solver)
    assert solution.status == [Status.CONVERGED, Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert solution.frontier.tolist() == [32, 32, 6, 32]
    assert solution.value.isfinite().all()
    assert not solution.certified[2]
    others = [0, 1, 3]
    assert torch.equal(images[others], healthy[others])
    assert torch.equal(images[2].flatten()[:6], healthy[2].flatten()[:6])


# -- a sweep with its step on the device (what a CUDA graph replays) -----------------------------------------------


def swept_on_the_device(system):
    loop = SolverLoop(system, Sequential())
    loop.run()
    loop._restart(None)
    for _ in range(system.length):
        loop._predetermined_device_iteration()
    return loop._solution(0.0, 0.0)


@every_coupling
def test_a_step_on_the_device_does_what_a_step_on_the_host_does(coupling):
    model = pixelcnnpp((3, 4, 8), num_classes=2)
    every_third = torch.arange(32).reshape(4, 8) % 3 == 0
    given = Given(torch.randint(0, 256, (1, 3, 4, 8), dtype=torch.uint8), every_third)
    system = model.sampling_system(3, incremental=False, options=SamplingOptions(coupling), given=given)
    assert not system.unroll
    model.load_noise(system, 1, [4, 0, 9])
    on_host = SolverLoop(system, Sequential()).run()
    on_device = swept_on_the_device(system)
    assert torch.equal(on_device.value, on_host.value)
    assert on_device.status == on_host.status == [Status.CONVERGED] * 3
    assert on_device.iterations.tolist() == on_host.iterations.tolist() == [32] * 3


def test_a_step_on_the_device_does_not_hide_a_failure():
    model = categorical((1, 4, 4), 5, num_classes=2)
    model.network = Sick(model.network, position=6, label=1)
    system = model.sampling_system(2, incremental=False)
    model.load_noise(system, 0, [0, 1])
    for _ in range(2):
        solution = swept_on_the_device(system)
        assert solution.status == [Status.CONVERGED, Status.NON_FINITE]
        assert solution.frontier.tolist() == [16, 6]


# -- the copy of the network -----------------------------------------------------------------------------------------


def test_folding_leaves_the_original_as_it_was():
    model = pixelcnnpp((1, 4, 8))
    network = model.network.train()
    x = torch.rand(2, 1, 4, 8)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    copies = [folded(network), folded(network)]
    assert network.training
    assert all(module.training for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert parametrize.is_parametrized(network.output)
    assert {"output.parametrizations.weight.original0", "output.parametrizations.weight.original1"} <= set(state)
    assert network.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    for replica in copies:
        assert not any(module.training for module in replica.modules())
        assert not any(parametrize.is_parametrized(module) for module in replica.modules())
        assert not any(parameter.requires_grad for parameter in replica.parameters())
        assert isinstance(replica.output.weight, nn.Parameter)
        assert {type(module) for module in replica.modules()}.isdisjoint(
            {type(module) for module in network.modules() if parametrize.is_parametrized(module)}
        )
        with torch.no_grad():
            assert torch.equal(replica(x), network.eval()(x))
    network(x).sum().backward()  # weight norm still reaches its own parameters
    assert network.output.parametrizations.weight.original0.grad is not None
    before = [replica(x) for replica in copies]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert all(torch.equal(replica(x), expected) for replica, expected in zip(copies, before, strict=True))
    assert not torch.equal(network(x), before[0])
    assert torch.equal(folded(network)(x), network(x))


def test_sampling_in_the_middle_of_training_disturbs_nothing():
    model = pixelcnnpp((3, 4, 8)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    images = torch.randint(0, 256, (4, 3, 4, 8), dtype=torch.uint8)
    options = SamplingOptions("paper")
    first = sample(model, 2, options=options)[1].value
    model.log_likelihood(images, torch.rand(images.shape)).sum().neg().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert torch.equal(sample(model, 2, options=options)[1].value, first)
    assert model.training
    left = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(left, gradients, strict=True))
    optimizer.step()
    assert not torch.equal(sample(model, 2, options=options)[1].value, first)


# -- arithmetic ----------------------------------------------------------------------------------------------------


def newer_flags():
    backends, cudnn = torch.backends, torch.backends.cudnn
    places = (backends.cuda.matmul, cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    return [place.fp32_precision for place in places] + [cudnn.benchmark, cudnn.deterministic, cudnn.enabled]


STATES = [
    "pass",
    "torch.set_float32_matmul_precision('medium')",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cudnn.benchmark = True",
    "torch.backends.cudnn.allow_tf32 = False; torch.backends.cudnn.deterministic = True",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
]


@pytest.mark.parametrize("state", STATES)
def test_the_arithmetic_is_set_and_put_back(state):
    """In a process of its own: the two ways to set it do not mix, and nothing undoes that."""
    program = f"""
import contextlib, torch
from test_autoregressive import newer_flags
from lit_parallel.sampling.autoregressive import arithmetic

def older():
    with contextlib.suppress(RuntimeError):
        return torch.get_float32_matmul_precision()

{state}
before = newer_flags(), older()
for precision in ("full", "tf32", "bf16"):
    with contextlib.suppress(KeyError), arithmetic(precision):
        gpu = "tf32" if precision == "tf32" else "ieee"
        assert newer_flags()[:2] == [gpu] * 2, newer_flags()
        assert newer_flags()[4:6] == [False, True]
        if precision == "full":
            assert newer_flags()[2:4] == ["ieee"] * 2, newer_flags()
        assert before[1] is None or older() is not None
        raise KeyError
    assert (newer_flags(), older()) == before, (newer_flags(), older(), before)
"""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, here.parent.parent)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("precision", ["bf16", "tf32"])
def test_lower_precision_is_another_function_on_which_all_solvers_agree(precision):
    model = pixelcnnpp((3, 8, 4))
    options = SamplingOptions(precision=precision)
    expected, sequential = sample(model, 3, solver="sequential", options=options)
    assert sequential.value.dtype == torch.float32
    assert torch.equal(sequential.value, sequential.value.round())
    assert 0 <= sequential.value.min() <= sequential.value.max() <= 255
    for solver in ("jacobi", "jacobi_gs", "gs_jacobi"):
        images, solution = sample(model, 3, solver=solver, options=options)
        assert torch.equal(images, expected)
        assert torch.equal(solution.value, sequential.value)
        assert solution.certified.all()
    full = sample(model, 3, solver="sequential")[0]
    assert torch.equal(full, expected) == (precision == "tf32")  # which a CPU does not have
    assert next(model.parameters()).dtype == torch.float32


# -- mistakes ------------------------------------------------------------------------------------------------------

IMAGES = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
MASK = torch.zeros(4, 4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("classes", "options", "given", "message"),
    [
        (None, {"label": 0}, None, "there is no class 0 to draw (sampling.label): the model is not class-conditional."),
        (3, {"label": 3}, None, "there is no class 3 to draw (sampling.label): it knows 0 to 2."),
        (None, {"coupling": "gumble"}, None, "'sampling.coupling' cannot be 'gumble'. Did you mean 'gumbel'?"),
        (None, {}, Given(IMAGES.float(), MASK), "uint8 of shape [n, 1, 4, 4], not float32 of shape [2, 1, 4, 4]."),
        (None, {}, Given(IMAGES[0], MASK), "uint8 of shape [n, 1, 4, 4], not uint8 of shape [1, 4, 4]."),
        (None, {}, Given(IMAGES[:, :, :3], MASK), "not uint8 of shape [2, 1, 3, 4]."),
        (None, {}, Given(IMAGES[:0], MASK), "there is no given image: the images are empty."),
        (None, {}, Given(IMAGES, MASK.float()), "bool of shape [4, 4] or [2, 4, 4], not float32 of shape [4, 4]."),
        (None, {}, Given(IMAGES, MASK.expand(3, 4, 4)), "not bool of shape [3, 4, 4]."),
    ],
)
def test_mistakes_are_told_in_one_line(classes, options, given, message):
    model = pixelcnnpp((1, 4, 4), num_classes=classes)
    with pytest.raises(UserError) as error:
        sample(model, 1, options=SamplingOptions(**options), given=given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# -- on a GPU ------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_coupling
@pytest.mark.parametrize("channels", [1, 3])
def test_on_a_gpu_every_graph_draws_the_bits_of_eager_sequential_sampling(coupling, channels):
    model = pixelcnnpp((channels, 4, 8), num_classes=3).cuda()
    every_third = torch.arange(32).reshape(4, 8) % 3 == 0
    given = Given(torch.randint(0, 256, (2, channels, 4, 8), dtype=torch.uint8), every_third)
    what = What(3, SamplingOptions(coupling, temperature=0.9), given)
    eager = Sampler(model, SolverOptions(name="sequential", cuda_graph=False), 4, what)
    graphs = [Sampler(model, exact(solver), 4, what) for solver in SOLVERS]
    for indices in ([0, 1, 2, 3], [9, 5]):  # the second time with other noise, labels and given pixels
        expected = eager.batch(indices)[1].value
        assert len(expected.unique()) > 10
        for sampler in graphs:
            _, solution = sampler.batch(indices)
            assert torch.equal(solution.value, expected), vars(sampler.loop.solver)
            assert solution.status == [Status.CONVERGED] * len(indices)
            assert sampler.name == "sequential" or solution.certified.all()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["full", "tf32", "bf16"])
def test_on_a_gpu_one_loop_serves_many_batches_in_every_precision(precision):
    model = pixelcnnpp((3, 8, 8), filters=32).cuda()
    what = What(0, SamplingOptions(precision=precision))
    samplers = [Sampler(model, solver, 3, what) for solver in ("sequential", "jacobi", "jacobi_gs", "gs_jacobi")]
    for indices in ([0, 1, 2], [3, 4, 5], [6]):
        expected, *others = [sampler.batch(indices)[0] for sampler in samplers]
        assert all(torch.equal(images, expected) for images in others)


@pytest.mark.gpu
def test_a_failure_in_a_cuda_graph_is_no_secret():
    model = categorical((1, 4, 4), 5, num_classes=2)

    class SickOnDevice(Sick):
        def forward(self, x, labels):
            output = self.network(x, labels)
            here = torch.arange(output.shape[1], device=x.device) == self.position
            return torch.where((labels == self.label)[:, None, None] & here[:, None], float("nan"), output)

    model.network = SickOnDevice(model.network, position=6, label=1)
    for solver in SOLVERS:
        solution = sample(model.cuda(), 2, solver=solver)[1]
        assert solution.status == [Status.CONVERGED, Status.NON_FINITE]
        assert solution.frontier.tolist() == [16, 6]


# -- what a user may get wrong -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SamplingOptions(temperature=0.0), "'sampling.temperature' must be"),
        (SamplingOptions(precision="fp16"), "'sampling.precision' cannot be 'fp16'"),
        (SamplingOptions(label=-1), "'sampling.label' must be"),
        (SamplingOptions(coupling="gumble"), "Did you mean 'gumbel'?"),
    ],
)
def test_options_made_in_python_are_checked_too(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        sample(pixelcnnpp((1, 4, 4), num_classes=2), 1, options=options)


def test_a_network_of_too_many_outputs_is_refused():
    class TooMany(torch.nn.Module):
        def forward(self, x):
            return torch.zeros(*x.shape, 5)

    model = ConditionalModule(TooMany(), Categorical(4), (1, 2, 3))
    wanted = re.escape("TooMany returned [samples, positions, parameters] = [2, 6, 5] for 2 samples")
    for coupling in ("gumbel", "inverse_cdf"):
        with pytest.raises(UserError, match=wanted):
            sample(model, 2, options=SamplingOptions(coupling=coupling))
    with pytest.raises(UserError, match=wanted):
        model.log_likelihood(torch.zeros(2, 1, 2, 3, dtype=torch.uint8), torch.zeros(2, 1, 2, 3))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_network_with_the_older_kind_of_weight_normalisation():
    class Older(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.utils.weight_norm(torch.nn.Linear(1, 4))

        def forward(self, x):
            return self.linear(torch.nn.functional.pad(x.float(), (1, 0))[:, :-1, None])

    network = Older()
    network(torch.zeros(1, 6, dtype=torch.int64)).sum().backward()  # its weight now has a history
    model = ConditionalModule(network, Categorical(4), (1, 2, 3))
    images, solution = sample(model, 3, solver="jacobi")
    assert solution.certified.all()
    assert torch.equal(images, sample(model, 3, solver="sequential")[0])
