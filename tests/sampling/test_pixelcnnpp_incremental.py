"""PixelCNN++ evaluated from what its layers remember: the full network's numbers, and sequential sampling's bits."""

from collections import Counter

import pytest
import torch
from small_models import pixel_by_pixel, pixelcnnpp
from torch.utils._python_dispatch import TorchDispatchMode

from lit_parallel.modules.options import PixelCNNppOptions
from lit_parallel.modules.pixelcnnpp import PixelCNNppModule
from lit_parallel.networks.causal import CausalConv2d, CausalConvTranspose2d, as_products
from lit_parallel.networks.initialisation import initialise_from_data
from lit_parallel.sampling.autoregressive import AutoregressiveSystem, Given
from lit_parallel.sampling.incremental import Memory, Rectangle
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.sampling.pixelcnnpp import IncrementalPixelCNNppSystem
from lit_parallel.sampling.sampler import sample
from lit_parallel.solution import Status
from lit_parallel.solvers import GSJacobi, Jacobi, JacobiGS, Sequential, SolverLoop, SolverOptions
from lit_parallel.solvers.options import CACHED_SEQUENTIAL
from lit_parallel.systems import select

BATCH = 3
SMALL = [(1, 8, 8), (3, 12, 8)]
every_shape = pytest.mark.parametrize("shape", SMALL)


def system_of(shape, batch=BATCH, *, double=True, **options) -> IncrementalPixelCNNppSystem:
    """An incremental system with noise loaded, labels if there are classes."""
    classes = options.pop("num_classes", None)
    given = options.pop("given", None)
    model = pixelcnnpp(shape, num_classes=classes)
    model = model.double() if double else model
    system = model.sampling_system(batch, incremental=True, options=SamplingOptions(**options), given=given)
    assert isinstance(system, IncrementalPixelCNNppSystem)
    model.load_noise(system, 0, list(range(batch)))
    return system


def levels(system) -> torch.Tensor:
    """A random iterate."""
    shape = (system.batch_size, system.length, system.plain.conditional.channels)
    return torch.randint(0, 256, shape).to(system.plain.guess)


def asked(system, width) -> torch.Tensor:
    return torch.zeros(system.batch_size, width, dtype=torch.int64)


def changed_from(x, frontier, other) -> torch.Tensor:
    """``other`` behind each sample's frontier, and in the pixel just before it, which was drawn last."""
    position = torch.arange(x.shape[1])
    return torch.where((position[None] < frontier[:, None] - 1)[:, :, None], x, other)


# -- the numbers of the full network ---------------------------------------------------------------------------------


@every_shape
@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("rows", [4, 8, 12])
def test_a_window_anywhere_has_the_full_networks_parameters(shape, products, rows):
    _, height, width = shape
    system = system_of(shape, num_classes=2)
    if products:
        as_products(system.network)
    before, behind = levels(system), levels(system)
    state = system.new_state()
    for frontier in range(0, height * width + 1, 5):  # the end included
        frontiers = (frontier + torch.tensor([0, 29, 53])) % (height * width + 1)
        system.reset(state, before)
        state.x.copy_(changed_from(before, frontiers, behind))
        expected = system.plain.parameters(state.x)
        equations, found = system.parameters(state, asked(system, rows * width), frontiers)
        if rows >= height:
            assert equations is None
        else:
            assert equations.shape == (BATCH, rows * width)
            inside = (equations[:, 0] <= frontiers) & (frontiers <= equations[:, -1])
            assert (inside | (frontiers == height * width)).all()
            assert (equations[:, 0] % (4 * width) == 0).all()
            assert (equations.diff(dim=1) == 1).all()
        torch.testing.assert_close(found, select(expected, equations), rtol=0, atol=1e-12)


@every_shape
@pytest.mark.parametrize("products", [False, True])
def test_a_walk_over_single_pixels_has_the_full_networks_parameters(shape, products):
    system = system_of(shape, num_classes=2)
    if products:
        as_products(system.network)
    before, behind = levels(system), levels(system)
    state = system.new_state()
    for start in (0, 1, 13, 24, 43):
        system.reset(state, before)
        now = torch.full((BATCH,), start)
        state.x.copy_(changed_from(before, now, behind))
        expected = system.plain.parameters(
            torch.where(torch.arange(system.length)[:, None] < start - 1, before, behind)
        )
        for t in range(start, system.length):
            state.x[:, t:] = -1e3  # nobody may read these
            equations, found = system.parameters(state, t, now)
            assert equations == t
            torch.testing.assert_close(found[:, 0], expected[:, t], rtol=0, atol=1e-12)
            state.x[:, t] = behind[:, t]


def test_windows_and_pixels_of_the_published_size():
    system = system_of((1, 28, 28), batch=2)
    x = levels(system)
    state = system.new_state()
    system.reset(state, x)
    expected = system.plain.parameters(x)
    for rows in (4, 8, 12, 28):
        for top in range(0, 28, 4):
            frontier = torch.tensor([top * 28 + 30, (24 - top) * 28])
            equations, found = system.parameters(state, asked(system, rows * 28), frontier)
            torch.testing.assert_close(found, select(expected, equations), rtol=0, atol=1e-12)
    for t in range(0, 784):
        _, found = system.parameters(state, t, torch.zeros(2, dtype=torch.int64))
        torch.testing.assert_close(found[:, 0], expected[:, t], rtol=0, atol=1e-12)


def test_deeper_networks():
    model = PixelCNNppModule(PixelCNNppOptions(filters=4, resnets=3, mixtures=2), (3, 8, 12))
    initialise_from_data(model.network, torch.rand(8, 3, 8, 12) * 2 - 1)
    system = model.double().sampling_system(2, incremental=True)
    x = levels(system)
    state = system.new_state()
    system.reset(state, x)
    expected, frontier = system.plain.parameters(x), torch.tensor([50, 0])
    equations, found = system.parameters(state, asked(system, 1), frontier)
    torch.testing.assert_close(found, select(expected, equations), rtol=0, atol=1e-12)
    system.reset(state, torch.zeros_like(x))
    for t in range(system.length):
        _, found = system.parameters(state, t, frontier)
        torch.testing.assert_close(found[:, 0], expected[:, t], rtol=0, atol=1e-12)
        state.x[:, t] = x[:, t]


@every_shape
@pytest.mark.parametrize(
    ("precision", "products", "bound"), [("full", False, 1e-4), ("full", True, 1e-4), ("bf16", False, 1.0)]
)
def test_other_precisions_are_as_close_as_they_are_precise(shape, precision, products, bound):
    system = system_of(shape, double=False, precision=precision)
    if products:
        as_products(system.network)
    x = levels(system)
    state = system.new_state()
    system.reset(state, x)
    expected = system.plain.parameters(x)
    frontiers = torch.tensor([0, 30, 63])
    for width in (1, system.length):
        equations, found = system.parameters(state, asked(system, width), frontiers)
        assert found.dtype == torch.float32
        assert (found - select(expected, equations)).abs().max() < bound
    for t in range(system.length):
        assert (system.parameters(state, t, frontiers)[1][:, 0] - expected[:, t]).abs().max() < bound


@pytest.mark.parametrize("equations", [None, torch.tensor([3, 17, 40])])
def test_what_is_asked_of_all_samples_alike_takes_the_whole_image(equations):
    system = system_of((3, 12, 8))
    x = levels(system)
    state, frontier = system.new_state(), torch.zeros(BATCH, dtype=torch.int64)
    state.x.copy_(x)
    evaluation = system.evaluate(state, equations, frontier, None)
    expected = x.clone()
    reference = system.reference().evaluate(expected, equations, frontier, None)
    assert torch.equal(system.value(state), expected)
    assert torch.equal(evaluation.change, reference.change)
    assert evaluation.equations is equations
    # And everything that is remembered belongs to what was read.
    state.x.copy_(x)
    _, found = system.parameters(state, asked(system, 8), torch.full((BATCH,), 50))
    torch.testing.assert_close(found, system.plain.parameters(x)[:, 32:64], rtol=0, atol=1e-12)


# -- what is really computed -----------------------------------------------------------------------------------------


def test_a_walk_over_single_pixels_runs_the_layers_that_are_due_and_no_other():
    shape = (_, height, width) = (1, 8, 16)
    system = system_of(shape, batch=1)
    state = system.new_state()
    calls, pixels = Counter(), Counter()

    def count(name):
        def hook(module, inputs, output):
            calls[name] += 1
            pixels[name] += output.shape[2:].numel()

        return hook

    for name, module in system.network.named_modules():
        if isinstance(module, (CausalConv2d, CausalConvTranspose2d)):
            module.register_forward_hook(count(name))
    for t in range(system.length):
        system.evaluate(state, t, torch.zeros(1, dtype=torch.int64), None)
    for name in pixels:
        part, _, rest = name.partition(".")
        number = int(rest[0]) if rest else 0
        level = {"encoder": number, "downsample": number + 1, "decoder": 2 - number, "upsample": 2 - number}.get(
            part, 0
        )
        rows, columns = height >> level, width >> level
        of_the_down_stream = name == "rows_above" or ".down." in name or name.endswith(".down")
        assert calls[name] == (rows if of_the_down_stream else rows * columns), name
        # Each output pixel once, and so in a full pass: a transposed convolution makes four of one.
        assert pixels[name] == rows * columns * (4 if part == "upsample" else 1), name
    names = {n for n, m in system.network.named_modules() if isinstance(m, (CausalConv2d, CausalConvTranspose2d))}
    assert pixels.keys() == names


@pytest.mark.parametrize(("width", "rows"), [(1, 4), (32, 4), (33, 8), (64, 8), (65, 12), (96, 12)])
def test_evaluations_are_counted_as_what_was_evaluated(width, rows):
    system = system_of((3, 12, 8))
    seen = []
    system.network.output.register_forward_hook(lambda _, inputs, output: seen.append(output.shape[2:].numel()))
    loop = SolverLoop(system, GSJacobi(width))
    seen.clear()
    solution = loop.run()
    assert torch.equal(solution.evaluations, solution.iterations * rows * 8)
    first, *others = seen
    assert first == 96  # what a new state remembers
    assert others == [rows * 8] * int(solution.iterations.max())


class NoLooking(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, or move a number to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        refused = ("_local_scalar_dense", "nonzero", "aten.equal", "lift_fresh", "masked_select", "unique")
        assert not any(word in name for word in refused), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("equations", [37, None, torch.tensor([3, 17]), torch.zeros(BATCH, 8, dtype=torch.int64)])
@pytest.mark.parametrize("products", [False, True])
def test_an_evaluation_never_looks_at_a_number(equations, products, monkeypatch):
    monkeypatch.setattr(IncrementalPixelCNNppSystem, "_leave_out_finished", lambda *_: None)  # on a CPU alone
    given = Given(torch.randint(0, 256, (1, 3, 12, 8), dtype=torch.uint8), torch.rand(12, 8) < 0.3)
    system = system_of((3, 12, 8), num_classes=2, given=given)
    if products:
        as_products(system.network)
    state, frontier = system.new_state(), torch.tensor([0, 41, 96])
    running = None if isinstance(equations, int) else frontier < 96
    system.evaluate(state, equations, frontier, running)  # whatever is made once
    with NoLooking():
        system.evaluate(state, equations, frontier, running)


def test_the_default_window_holds_whole_groups_of_rows():
    for shape in [(1, 4, 8), (3, 12, 8), (1, 28, 28)]:
        system = system_of(shape, batch=1)
        assert system.window % (4 * shape[2]) == 0
        assert system.window <= system.length
        assert (system.block_size, system.unroll) == (shape[2], True)


# -- the bits of sequential sampling ---------------------------------------------------------------------------------


def expected_of(system) -> torch.Tensor:
    """Sequential sampling by full passes."""
    return SolverLoop(system.reference(), Sequential()).run().value


SOLVERS = [GSJacobi(1), GSJacobi(40), GSJacobi(96), Jacobi(), JacobiGS(11), Sequential()]


@pytest.mark.parametrize("coupling", ["gumbel", "inverse_cdf", "mixture_8bit", "paper"])
@pytest.mark.parametrize(("shape", "double"), [((1, 8, 8), True), ((3, 12, 8), False)])
def test_every_solver_certifies_the_bits_of_sequential_sampling(shape, double, coupling):
    system = system_of(shape, double=double, coupling=coupling, num_classes=2, temperature=0.8)
    expected = expected_of(system)
    assert len(expected.unique()) > 20
    for solver in SOLVERS if coupling == "gumbel" else SOLVERS[1:2]:
        solution = SolverLoop(system, solver, certify=True).run()
        assert torch.equal(solution.value, expected), solver
        assert solution.status == [Status.CONVERGED] * BATCH
        assert solution.certified.all()
        assert (solution.iterations <= system.length).all()
        if double and coupling != "paper":  # in float32 a rounding error may now and then decide between levels
            assert (solution.certificate_iterations == 1).all()


@pytest.mark.parametrize("solver", [CACHED_SEQUENTIAL, "gs_jacobi", SolverOptions(window=32)])
@pytest.mark.parametrize("label", [None, 1])
def test_given_pixels_and_classes(solver, label):
    model = pixelcnnpp((3, 8, 8), num_classes=3).double()
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    mask = torch.rand(2, 8, 8) < 0.4
    mask[1, :5] = True  # more than a group of rows
    expected = pixel_by_pixel(
        model, [0, 1, 2, 3], label=label, given=images[[0, 1, 0, 1]].double(), mask=mask[[0, 1, 0, 1]]
    )
    found, solution = sample(model, 4, solver=solver, options=SamplingOptions(label=label), given=Given(images, mask))
    assert torch.equal(found, expected.round().to(torch.uint8))
    assert solution.status == [Status.CONVERGED] * 4
    assert solution.certified.all() or solver == CACHED_SEQUENTIAL


@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_other_batches_leave_no_trace(precision):
    model = pixelcnnpp((1, 8, 8))
    model = model.double() if precision == "full" else model
    options = SamplingOptions(precision=precision)
    expected, _ = sample(model, 7, solver="sequential", seed=3, options=options, batch_size=3)
    # Cached sequential sampling is not certified: only of double precision does one expect the same levels.
    others = [CACHED_SEQUENTIAL] if precision == "full" else []
    for solver in ("gs_jacobi", SolverOptions(window=32), *others):
        found, _ = sample(model, 7, solver=solver, seed=3, options=options, batch_size=3)
        assert torch.equal(found, expected)


def test_a_result_that_rounding_has_spoilt_is_repaired(monkeypatch):
    """Whatever the windows make of it, the certificate leads to the reference's bits."""
    system = system_of((1, 8, 8), double=False)
    expected = expected_of(system)
    evaluate = IncrementalPixelCNNppSystem._evaluate
    monkeypatch.setattr(IncrementalPixelCNNppSystem, "_evaluate", lambda *args: evaluate(*args) + 0.05)
    solution = SolverLoop(system, GSJacobi(32), certify=True).run()
    assert (solution.certificate_iterations > 1).any()
    assert solution.certified.all()
    assert torch.equal(solution.value, expected)


# -- samples and iterates --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("equations", [None, torch.tensor([3, 17]), torch.zeros(BATCH, 8, dtype=torch.int64)])
def test_finished_samples_do_not_change(equations):
    system = system_of((3, 12, 8))
    state = system.new_state()
    x = levels(system)
    system.reset(state, x)
    system.evaluate(state, equations, torch.tensor([96, 0, 40]), torch.tensor([False, True, False]))
    found = system.value(state)
    assert torch.equal(found[[0, 2]], x[[0, 2]])
    assert not torch.equal(found[1], x[1])


@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_windows_of_finished_samples_are_not_evaluated(precision, monkeypatch):
    given = Given(torch.randint(0, 256, (1, 1, 12, 8), dtype=torch.uint8), torch.rand(12, 8) < 0.1)
    system = system_of((1, 12, 8), 8, num_classes=2, given=given, precision=precision, double=precision == "full")
    seen = []
    system.network.output.register_forward_hook(lambda _, inputs, output: seen.append(len(output)))
    loop = SolverLoop(system, GSJacobi(32), record_residual=True)
    solutions, counts = [], []
    for leave_out in (False, True, True):  # again: all of them are there
        with monkeypatch.context() as patch:
            if not leave_out:
                patch.setattr(IncrementalPixelCNNppSystem, "_leave_out_finished", lambda *_: None)
            solutions.append(loop.run())
        counts.append(seen.copy())
        seen.clear()
    everything, *others = solutions
    in_work = [int((everything.iterations >= step).sum()) for step in range(1, len(everything.residual) + 1)]
    assert len(set(in_work)) > 3
    assert counts[0] == [8] * (1 + len(in_work))  # and the whole image, once
    assert counts[1] == counts[2] == in_work
    for solution in others:
        assert solution.status == [Status.CONVERGED] * 8
        for name in ("value", "iterations", "evaluations", "frontier", "final_iteration", "residual"):
            assert torch.equal(getattr(solution, name), getattr(everything, name)), name


def test_a_sample_does_not_depend_on_its_neighbours():
    together = system_of((1, 8, 8), batch=4)
    solution = SolverLoop(together, GSJacobi(32)).run()
    alone = together.plain.__class__(
        together.network, together.plain.conditional, together.plain.positions, 1, together.plain.options
    )
    loop = SolverLoop(IncrementalPixelCNNppSystem(alone), GSJacobi(32))
    for index in range(4):
        alone.load(0, [index])
        single = loop.run()
        assert torch.equal(single.value[0], solution.value[index])
        assert single.iterations[0] == solution.iterations[index]  # each has its own window
    assert len(set(solution.iterations.tolist())) > 1


def test_a_changed_iterate_refills_what_is_remembered():
    system = system_of((1, 8, 8))
    used, fresh = system.new_state(), system.new_state()
    SolverLoop(system, Sequential()).run()
    x = levels(system)
    for state in (used, fresh):
        system.reset(state, x)
        x = torch.where(torch.rand_like(x) < 0.5, x, levels(system))
    system.reset(used, x)
    assert torch.equal(system.value(used), x)
    expected = system.plain.parameters(x)
    frontier = torch.tensor([32, 40, 63])
    for t in (9, 63):
        torch.testing.assert_close(system.parameters(used, t, frontier)[1][:, 0], expected[:, t], rtol=0, atol=1e-12)
    equations, found = system.parameters(used, asked(system, 8), frontier)
    torch.testing.assert_close(found, select(expected, equations), rtol=0, atol=1e-12)
    # What is not finite does not enter.
    system.reset(used, torch.full_like(x, torch.inf))
    assert torch.equal(system.value(used), system.plain.guess)


@pytest.mark.parametrize("solver", [GSJacobi(32), GSJacobi(64), JacobiGS(), Sequential()], ids=lambda s: s.name)
def test_any_start_leads_to_the_same_result(solver):
    system = system_of((1, 8, 8))
    expected = expected_of(system)
    loop = SolverLoop(system, solver)
    assert torch.equal(loop.run(start=levels(system)).value, expected)
    again = loop.run(start=expected)
    assert torch.equal(again.value, expected)
    assert solver.predetermined or (again.iterations < 20).all()


def test_a_sample_whose_parameters_are_not_finite_fails_alone_and_is_forgotten():
    system = system_of((1, 8, 8))
    healthy = SolverLoop(system, GSJacobi(32)).run().value
    noise = system.plain.noise.clone()
    for solver in (GSJacobi(32), Sequential()):
        loop = SolverLoop(system, solver)
        draw = system.plain.draw

        def sick(parameters, equations, samples=None, draw=draw):
            new = draw(parameters, equations, samples)
            number = torch.arange(64).expand(len(new), -1)
            sample_numbers = torch.arange(BATCH) if samples is None else samples
            here = (select(number, equations) == 20) & (sample_numbers == 1)[:, None]
            return torch.where(here[:, :, None], torch.nan, new)

        system.plain.draw = sick
        solution = loop.run()
        system.plain.draw = draw
        assert [status.name for status in solution.status] == ["CONVERGED", "NON_FINITE", "CONVERGED"]
        assert solution.frontier.tolist() == [64, 20, 64]
        assert torch.equal(solution.value[[0, 2]], healthy[[0, 2]])
        assert torch.equal(solution.value[1, :20], healthy[1, :20])
        system.plain.noise.copy_(noise)
        assert torch.equal(loop.run().value, healthy)


# -- rectangles and memories -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("margins", [(0, 0), (1, 0), (1, 1)])
def test_a_memory_gives_what_is_around_a_part_and_zeros_around_the_image(margins):
    left, right = margins
    x = torch.randn(3, 5, 8, 6)
    memory = Memory(x[:, :, :2, :2], (8, 6), left, right)
    framed = torch.nn.functional.pad(x, (left, right, 1, 0))
    memory.write(x, Rectangle(0, 8, 0, 6, (8, 6)))
    tops = torch.tensor([4, 0, 2])
    found = memory.read(Rectangle(tops, 4, 0, 6, (8, 6)))
    for sample_found, sample_framed, top in zip(found, framed, tops.tolist(), strict=True):
        assert torch.equal(sample_found, sample_framed[:, top : top + 5])
    new = torch.randn(3, 5, 2, 6)
    memory.write(new, Rectangle(tops, 2, 0, 6, (8, 6)))
    for image, part, top in zip(framed, new, tops.tolist(), strict=True):
        image[:, 1 + top : 3 + top, left : left + 6] = part
    memory.write(new[:, :, :1, :2], Rectangle(6, 1, 3, 2, (8, 6)))
    framed[:, :, 7:8, left + 3 : left + 5] = new[:, :, :1, :2]
    assert torch.equal(memory.read(Rectangle(0, 8, 0, 6, (8, 6))), framed)
    assert torch.equal(memory.read(Rectangle(5, 2, 2, 1, (8, 6))), framed[:, :, 5:8, 2 : 3 + left + right])


def test_the_reference_is_plain_and_always_the_same():
    system = system_of((1, 8, 8))
    assert type(system.reference()) is AutoregressiveSystem
    assert system.reference() is system.reference()
    assert system.tolerance == 0
    assert system_of((1, 8, 8), coupling="paper").tolerance == 0.01
