"""Whole passes of the fused PixelCNN++ sampler: here through the plain functions beside its kernels, and on a GPU."""

import dataclasses
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from small_models import pixel_by_pixel, pixelcnnpp

from lit_parallel.errors import UserError
from lit_parallel.modules.pixelcnnpp import PixelCNNppModule
from lit_parallel.sampling import pixelcnnpp_fused
from lit_parallel.sampling.auto import choose
from lit_parallel.sampling.autoregressive import Given
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.sampling.pixelcnnpp_fused import FusedPixelCNNppSystem, PixelSweep, WindowSweep
from lit_parallel.sampling.sampler import Sampler, What, sample
from lit_parallel.solution import Status
from lit_parallel.solvers import GSJacobi, SolverLoop, SolverOptions
from lit_parallel.solvers.options import CACHED_SEQUENTIAL

BATCH = 3
SHAPES = [(1, 8, 8), (3, 12, 8)]
COUPLINGS = ["gumbel", "inverse_cdf", "mixture_8bit"]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True)
def _covered(monkeypatch, request):
    """Let the system take its own way on a CPU, too."""
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("device") == "cpu":
        monkeypatch.setattr(FusedPixelCNNppSystem, "covered", staticmethod(lambda plain: True))
        monkeypatch.setattr("lit_parallel.modules.pixelcnnpp.triton_runs_on", lambda device: True)


def plain_system(model, batch=BATCH, given=None, **options):
    system = model.sampling_system(batch, incremental=False, options=SamplingOptions(**options), given=given)
    model.load_noise(system, 0, list(range(batch)))
    return system


@devices
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [4, 8])
@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_a_sweep_iterates_as_the_solver_loop_does(device, shape, rows, slots):
    torch.manual_seed(0)
    model = pixelcnnpp(shape).to(device)
    plain = plain_system(model)
    loop = SolverLoop(plain, GSJacobi(rows * shape[2]), certify=True)
    expected = loop.run()
    sweep = WindowSweep(plain, rows, slots, plain.length, record_residual=True)
    for _ in range(2):  # the second time from what the first one left behind
        sweep.x.copy_(plain.guess)
        books = sweep.run()
        assert torch.equal(sweep.x, expected.value)
        assert books.frontier.tolist() == [plain.length] * BATCH
        assert not books.failed.any()
        assert (books.iterations <= plain.length).all()
        assert (books.evaluations == books.iterations * rows * shape[2]).all()
        assert int(books.changed_in.max()) < int(books.iterations.max()) + 1
        assert not books.residual[int(books.iterations.max()) :].any()
    assert not (sweep.windows.sample >= 0).any()


@devices
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("slots", [1, 2, 256])
def test_a_sweep_by_pixels_is_sequential_sampling(device, shape, slots, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(pixelcnnpp_fused, "_MOST", slots)
    model = pixelcnnpp(shape).to(device)
    plain = plain_system(model)
    sweep = PixelSweep(plain)
    for _ in range(2):
        sweep.x.copy_(plain.guess)
        sweep.run()
        if device == "cpu":
            expected = pixel_by_pixel(model, list(range(BATCH)))
        else:
            expected, _ = Sampler(model, "sequential", BATCH).batch([0, 1, 2])
        assert torch.equal(plain.images(sweep.x), expected)


@devices
def test_a_sweep_by_pixels_stops_at_its_limit(device):
    torch.manual_seed(0)
    model = pixelcnnpp((1, 8, 8)).to(device)
    options = SolverOptions(name=CACHED_SEQUENTIAL, certify=False)
    whole, _ = Sampler(model, options, BATCH).batch([0, 1, 2])
    for limit in (1, 13, 24):
        sampler = Sampler(model, dataclasses.replace(options, max_iterations=limit), BATCH)
        images, solution = sampler.batch([0, 1, 2])
        assert isinstance(sampler.loop._state, FusedPixelCNNppSystem.Swept)
        assert torch.equal(images.flatten(1)[:, :limit], whole.flatten(1)[:, :limit])
        assert not images.flatten(1)[:, limit:].any()
        assert solution.frontier.tolist() == [limit] * BATCH
        assert solution.status == [Status.ITERATION_LIMIT] * BATCH


@devices
@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("solver", ["gs_jacobi", CACHED_SEQUENTIAL])
def test_the_sampler_takes_this_way_and_certifies_it(device, coupling, solver):
    torch.manual_seed(0)
    model = pixelcnnpp((3, 8, 8), num_classes=3).to(device)
    what = What(0, SamplingOptions(coupling=coupling, temperature=0.9))
    sampler = Sampler(model, SolverOptions(name=solver), BATCH, what, record_residual=True)
    assert isinstance(sampler.system, FusedPixelCNNppSystem)
    images, solution = sampler.batch([0, 1, 2])
    expected, _ = Sampler(model, "sequential", BATCH, what).batch([0, 1, 2])
    assert torch.equal(images, expected)
    assert solution.certified.all()
    assert solution.status == [Status.CONVERGED] * BATCH
    again, _ = sampler.batch([1, 2])  # other labels and noise, through the same graphs
    assert torch.equal(again, expected[1:])
    if solver == "gs_jacobi":
        assert (solution.iterations <= 64).all()
        assert sampler.pixel_map(solution).shape == (BATCH, 8, 8)
        assert solution.residual is not None
        assert (solution.residual[0] > 0).all()


@devices
def test_given_pixels_stay(device):
    torch.manual_seed(0)
    model = pixelcnnpp((3, 8, 8)).to(device)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:5, 3:] = True
    given = Given(torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8), mask)
    images, solution = sample(model, BATCH, solver="gs_jacobi", given=given)
    expected, _ = sample(model, BATCH, solver="sequential", given=given)
    assert torch.equal(images, expected)
    assert torch.equal(images[..., mask], given.images.expand(BATCH, -1, -1, -1)[..., mask])
    assert solution.certified.all()


@devices
def test_a_sample_that_is_not_finite_spares_the_others(device):
    torch.manual_seed(0)
    model = pixelcnnpp((1, 8, 8), num_classes=3).to(device)
    with torch.no_grad():
        for name, module in model.network.named_modules():
            if name.endswith("down_right.label"):
                module.weight[1] = float("inf")
    images, solution = sample(model, BATCH, solver="gs_jacobi")
    assert [status == Status.NON_FINITE for status in solution.status] == [False, True, False]
    expected, _ = sample(model, BATCH, solver="sequential")
    assert torch.equal(images[::2], expected[::2])


@devices
def test_an_iteration_limit_ends_a_sweep(device):
    torch.manual_seed(0)
    model = pixelcnnpp((1, 8, 8)).to(device)
    sampler = Sampler(model, SolverOptions(name="gs_jacobi", max_iterations=3), BATCH)
    _, solution = sampler.batch([0, 1, 2])
    assert solution.iterations.tolist() == [3] * BATCH
    assert solution.status == [Status.ITERATION_LIMIT] * BATCH
    assert (solution.frontier >= 3).all()


@devices
def test_without_cuda_graphs_the_plain_evaluation_is_taken(device):
    torch.manual_seed(0)
    model = pixelcnnpp((1, 8, 8)).to(device)
    sampler = Sampler(model, SolverOptions(name="gs_jacobi", cuda_graph=False), BATCH)
    images, _ = sampler.batch([0, 1, 2])
    assert not isinstance(sampler.loop._state, FusedPixelCNNppSystem.Swept)
    assert torch.equal(images, Sampler(model, "gs_jacobi", BATCH).batch([0, 1, 2])[0])


@pytest.mark.gpu
def test_what_kernels_do_not_cover_takes_full_passes():
    torch.manual_seed(0)
    model = pixelcnnpp((1, 8, 8)).to("cuda")
    for options in (SamplingOptions(coupling="paper"), SamplingOptions(precision="bf16")):
        system = model.sampling_system(BATCH, incremental=True, options=options)
        assert not isinstance(system, FusedPixelCNNppSystem)
        with pytest.raises(UserError, match="no evaluation from caches"):
            Sampler(model, CACHED_SEQUENTIAL, BATCH, What(0, options))


@devices
def test_the_users_window_is_taken_rounded_up_to_whole_rows(device):
    torch.manual_seed(0)
    model = pixelcnnpp((1, 12, 8)).to(device)
    for window, pixels in ((3, 32), (32, 32), (33, 64), (96, 96), (None, 64)):
        _, solution = Sampler(model, SolverOptions(name="gs_jacobi", window=window), BATCH).batch([0, 1, 2])
        assert (solution.evaluations == solution.iterations * pixels).all()


@devices
def test_two_loops_on_one_system_do_not_disturb_each_other(device):
    torch.manual_seed(0)
    system = FusedPixelCNNppSystem(plain_system(pixelcnnpp((1, 8, 8)).to(device)))
    first, second = SolverLoop(system, GSJacobi(32)), SolverLoop(system, GSJacobi(64))
    expected = first.run()
    assert torch.equal(second.run().value, expected.value)
    again = first.run()
    assert torch.equal(again.value, expected.value)
    assert torch.equal(again.iterations, expected.iterations)


@devices
def test_a_tolerance_is_for_the_plain_evaluation(device):
    torch.manual_seed(0)
    model = pixelcnnpp((1, 8, 8)).to(device)
    sampler = Sampler(model, SolverOptions(name="gs_jacobi", absolute_tolerance=0.5, certify=False), BATCH)
    _, solution = sampler.batch([0, 1, 2])
    assert not isinstance(sampler.loop._state, FusedPixelCNNppSystem.Swept)
    assert solution.status == [Status.SETTLED] * BATCH


@devices
def test_a_sampler_can_be_watched_before_and_after_its_own_runs(device):
    torch.manual_seed(0)
    model = pixelcnnpp((1, 8, 8)).to(device)
    sampler = Sampler(model, "gs_jacobi", BATCH)
    images, _ = sampler.batch([0, 1, 2])
    seen = []
    watched, _ = sampler.batch([0, 1, 2], observer=lambda step, x: seen.append(step))
    assert torch.equal(watched, images)
    assert seen == list(range(len(seen)))
    assert len(seen) > 2
    assert torch.equal(sampler.batch([0, 1, 2])[0], images)


def test_a_pixel_runs_only_the_layers_that_are_due(monkeypatch):
    """Otherwise the rival of parallel iteration would be a straw man."""
    from lit_parallel.kernels import pixelcnnpp as kernels

    torch.manual_seed(0)
    sweep = PixelSweep(plain_system(pixelcnnpp((1, 8, 8))))
    runs = Counter()

    def count(table, workspace, jobs, tile=None):
        for index in jobs:
            job = table.layers.jobs[index]
            runs[job.level, job.down] += 1

    monkeypatch.setattr(kernels, "run", count)
    sweep.run()
    layers = Counter((job.level, job.down) for job in sweep.laid_out.layers.jobs)
    for level in range(3):
        size = 8 >> level
        assert runs[level, False] == size * size * layers[level, False]
        assert runs[level, True] == size * layers[level, True]


def test_as_many_images_are_in_work_as_memory_takes(monkeypatch):
    sweep = WindowSweep(plain_system(pixelcnnpp((1, 8, 8))), 4, 3, 64)
    each = 12 * sweep.laid_out.elements
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * each, 9 * each))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 8 * each)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6 * each)
    assert sweep._fitting(torch.device("cuda")) == 4
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 9 * each))
    assert sweep._fitting(torch.device("cuda")) == 1


def test_where_kernels_do_not_run_nothing_is_called_cached(monkeypatch):
    torch.manual_seed(0)
    model = pixelcnnpp((1, 8, 8))
    ordinary = PixelCNNppModule.sampling_system

    def in_full(self, batch_size, *, incremental, **how):
        return ordinary(self, batch_size, incremental=False, **how)

    monkeypatch.setattr(PixelCNNppModule, "sampling_system", in_full)
    with pytest.raises(UserError, match="no evaluation from caches with these sampling options on this device"):
        Sampler(model, CACHED_SEQUENTIAL, BATCH)
    choice = choose(model, SolverOptions(name="auto", remeasure=True), BATCH, What())
    assert all(CACHED_SEQUENTIAL not in candidate.label for candidate in choice.candidates)


def test_without_triton_a_model_is_sampled_all_the_same():
    code = (
        "import sys; sys.modules['triton'] = None; sys.path[:0] = " + repr(sys.path) + "\n"
        "import lit_parallel.checkpoint, train, sample\n"
        "from lit_parallel.sampling.sampler import sample\n"
        "from small_models import pixelcnnpp\n"
        "assert sample(pixelcnnpp((1, 8, 8)), 2)[1].certified.all()\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300, cwd=root
    )
    assert done.returncode == 0, done.stderr
