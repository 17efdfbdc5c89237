"""``solver.name=auto``: what is measured, what is chosen, and what is kept. The clocks are made up."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import pooch
import pytest
import torch
from small_models import categorical, pixelcnnpp

import lit_parallel
from callbacks.sample_grid import SampleGrid
from lit_parallel.checkpoint import as_checkpoint, build_model
from lit_parallel.config import SampleConfig, TrainConfig, load_config
from lit_parallel.errors import UserError
from lit_parallel.modules.made import MadeModule
from lit_parallel.modules.options import MadeOptions
from lit_parallel.sampling import auto
from lit_parallel.sampling.auto import Candidate, check, choose
from lit_parallel.sampling.autoregressive import Given
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.sampling.predict import SamplingModule
from lit_parallel.sampling.sampler import Sampler, What, check_sampler
from lit_parallel.solution import Status
from lit_parallel.solvers import SolverLoop, SolverOptions, build_solver
from lit_parallel.systems import TriangularSystem
from lit_parallel.tracking import log_choice
from sample import sample

AUTO = SolverOptions(name="auto", measure_seconds=1e9)
LENGTH = 64  # of the PixelCNN++: 8 x 8
WINDOWS = ("gs_jacobi with window 32 (4 rows)", "gs_jacobi with window 64 (8 rows)")
NAMED = {
    WINDOWS[0]: SolverOptions(window=32),
    WINDOWS[1]: SolverOptions(window=64),
    "jacobi": SolverOptions(name="jacobi"),
    "cached_sequential": SolverOptions(name="cached_sequential"),
    "sequential": SolverOptions(name="sequential"),
}


@pytest.fixture
def model():
    return pixelcnnpp((1, 8, 8))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The user's cache folder."""
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / "cache" / project)
    return tmp_path / "cache" / "lit-parallel" / "solvers"


@pytest.fixture
def lines(caplog):
    caplog.set_level(logging.INFO, "lit_parallel.sampling.auto")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "lit_parallel.sampling.auto"]


class Clock:
    """Makes an iteration of each candidate take so many seconds: 1.0, unless said otherwise.

    Attributes:
        costs: Seconds of an iteration, by label.
        spoil: Changes solutions, by label.
        runs: Label and iterations of every run.
    """

    def __init__(self, monkeypatch) -> None:
        self.costs, self.spoil, self.runs, self.now = {}, {}, [], 0.0
        run = SolverLoop.run

        def timed(loop, start=None, observer=None):
            solution = run(loop, start, observer)
            if start is not None:  # a certificate
                return solution
            label = self._label(loop)
            self.spoil.get(label, lambda solution: None)(solution)
            iterations = int(solution.iterations.max())
            solution.seconds = self.costs.get(label, 1.0) * iterations
            self.now += solution.seconds
            self.runs.append((label, iterations))
            return solution

        monkeypatch.setattr(SolverLoop, "run", timed)
        monkeypatch.setattr(auto, "monotonic", lambda: self.now)

    @staticmethod
    def _label(loop) -> str:
        if loop.solver.name == "gs_jacobi":
            return next((label for label in WINDOWS if f"window {loop.solver.window} " in label), "gs_jacobi")
        cached = loop.solver.name == "sequential" and type(loop.system).__name__.startswith("Incremental")
        return "cached_sequential" if cached else loop.solver.name


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def measured(model, clock, options=AUTO, **costs):
    clock.costs |= costs
    choice = choose(model, options, 3, What(5))
    return choice, {candidate.label: candidate for candidate in choice.candidates}


# -- what is chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fastest", [*WINDOWS, "jacobi", "cached_sequential"])
def test_the_fastest_is_chosen_and_gives_its_own_bits(model, clock, fastest):
    clock.costs[fastest] = 1e-3
    images, solution = lit_parallel.sample(model, 5, solver=AUTO, seed=5, batch_size=3)
    by_name, named = lit_parallel.sample(model, 5, solver=NAMED[fastest], seed=5, batch_size=3)
    expected, sequential = lit_parallel.sample(model, 5, solver="sequential", seed=5, batch_size=3)
    assert torch.equal(images, by_name)
    assert torch.equal(images, expected)
    assert torch.equal(solution.value, named.value)
    assert torch.equal(solution.iterations, named.iterations)
    assert torch.equal(solution.value, sequential.value)
    assert solution.solver == NAMED[fastest].name
    assert solution.certified.all()


def test_a_model_without_caches_is_compared_with_plain_sequential_sampling(clock):
    choice, rows = measured(categorical((1, 3, 4), 5), clock, sequential=1e-3)
    assert list(rows) == ["gs_jacobi with window 12 (3 rows)", "sequential", "jacobi"]
    assert choice.solver == SolverOptions(name="sequential")
    assert rows["sequential"].certified is False  # it is the definition


def test_the_choice_is_told_in_one_line(model, clock, lines):
    clock.costs = {WINDOWS[0]: 0.5, WINDOWS[1]: 0.25, "jacobi": 0.375, "cached_sequential": 0.125}
    choice, rows = measured(model, clock)
    window, jacobi = (rows[label].iterations_max for label in (WINDOWS[1], "jacobi"))
    assert rows["cached_sequential"].iterations_max == LENGTH
    assert rows["cached_sequential"].seconds_per_image == pytest.approx(0.125 * LENGTH / 3)
    assert rows["jacobi"].seconds_per_image == pytest.approx(0.375 * jacobi / 3)
    assert rows["jacobi"].certified
    assert choice.solver == SolverOptions(window=64)
    assert choice.label == WINDOWS[1]
    (line,) = lines()
    assert line.startswith(f"solver auto: {WINDOWS[1]}, {0.25 * window / 3:.2g} s per image; ")
    assert f"jacobi {0.375 * jacobi / 3:.2g}" in line
    assert "\n" not in line
    choose(model, AUTO, 3, What(5))
    assert len(lines()) == 1  # known in this process: nothing to tell


def test_the_options_of_all_candidates_are_those_asked_for(model, clock):
    options = replace(AUTO, certify=False, relative_tolerance=1e-3, absolute_tolerance=0.5, remeasure=True)
    choice, rows = measured(model, clock, options, jacobi=1e-3)
    wanted = SolverOptions(name="jacobi", certify=False, relative_tolerance=1e-3, absolute_tolerance=0.5)
    assert choice.solver == wanted  # and says nothing of the measurement any more
    assert not any(candidate.certified for candidate in rows.values())


@pytest.mark.parametrize("label", [WINDOWS[0], "jacobi", "cached_sequential"])
def test_what_is_not_solved_is_not_chosen(model, clock, label):
    def fail(solution):
        solution.status = [Status.NON_FINITE, *solution.status[1:]]

    clock.spoil[label] = fail
    choice, rows = measured(model, clock, replace(AUTO, certify=False), **{label: 1e-3})
    assert rows[label].outcome == "not solved"
    assert rows[label].equal is None
    assert choice.label != label


@pytest.mark.parametrize("label", [WINDOWS[0], WINDOWS[1], "cached_sequential"])
def test_other_images_are_not_chosen(model, clock, label):
    def draw_something_else(solution):
        solution.value = (solution.value + 1) % 256

    clock.spoil[label] = draw_something_else
    choice, rows = measured(model, clock, replace(AUTO, certify=False), **{label: 0.9})
    assert rows[label].outcome == "measured"
    assert {row.label: row.equal for row in rows.values() if row.equal is not None} == {
        other: other != label for other in rows if rows[other].equal is not None
    }
    assert choice.label != label


def test_where_nothing_is_solved_the_ordinary_choice_is_not_kept(model, clock, folder, lines):
    def fail(solution):
        solution.status = [Status.ITERATION_LIMIT] * len(solution.status)

    clock.spoil = dict.fromkeys((*WINDOWS, "jacobi", "cached_sequential"), fail)
    choice, _ = measured(model, clock)
    assert choice.solver == SolverOptions(window=32)
    assert not folder.exists()
    assert "nothing was solved" in lines()[0]


def test_what_does_not_fit_into_memory_is_left_out(model, clock, lines):
    def too_large(solution):
        raise torch.OutOfMemoryError

    clock.spoil["jacobi"] = too_large
    choice, rows = measured(model, clock, jacobi=1e-3)
    assert rows["jacobi"] == Candidate("jacobi", "not measured: out of memory")
    assert choice.label != "jacobi"
    assert "jacobi not measured: out of memory" in lines()[0]


# -- how long it takes ---------------------------------------------------------------------------------------------


def test_what_is_clearly_slower_is_not_run_to_the_end(model, clock, lines):
    _, rows = measured(model, clock, **{WINDOWS[0]: 1e-3, "jacobi": 0.5, "cached_sequential": 2.0})
    assert rows[WINDOWS[0]].outcome == "measured"
    assert rows["cached_sequential"].outcome == f"extrapolated from {LENGTH // 8} of {LENGTH} steps"
    assert rows["cached_sequential"].seconds_per_image == pytest.approx(2.0 * LENGTH / 3)
    assert rows["jacobi"].outcome == "stopped after 8 iterations: slower"
    assert max(iterations for label, iterations in clock.runs if label == "cached_sequential") == LENGTH // 8
    assert max(iterations for label, iterations in clock.runs if label == "jacobi") == 8
    assert f"cached_sequential about {2.0 * LENGTH / 3:.2g}" in lines()[0]
    assert f"jacobi > {0.5 * 8 / 3:.2g}" in lines()[0]


def test_a_parallel_solver_is_stopped_once_it_is_clearly_slower(model, clock):
    needed = {"jacobi": 0, WINDOWS[0]: 0}
    for label in needed:
        Sampler(model, NAMED[label], 3, 5).batch([0, 1, 2])
        needed[label] = clock.runs[-1][1]
    assert min(needed.values()) > 9
    # Twice the first one's time suffices for one iteration less than the second one needs.
    cost = 2 * needed[WINDOWS[0]] / (needed["jacobi"] - 0.5)
    _, rows = measured(model, clock, **{"jacobi": cost, WINDOWS[1]: 1e6, "cached_sequential": 1e6})
    limit = needed["jacobi"] - 1
    assert rows["jacobi"].outcome == f"stopped after {limit} iterations: slower"
    assert rows["jacobi"].iterations_max == limit
    assert not rows["jacobi"].eligible


def test_the_cheapest_is_run_first_and_full_passes_one_by_one_last(clock):
    measured(categorical((1, 4, 8), 5), clock, **{WINDOWS[0]: 3.0, "jacobi": 2.0, "sequential": 1.0})
    order = [label for label, _ in clock.runs]
    assert order[:3] == [WINDOWS[0], "sequential", "jacobi"]  # as they are tried
    assert order[3:5] == ["jacobi", WINDOWS[0]]


@pytest.mark.parametrize("seconds", [1e-6, 10.0])
def test_after_some_time_the_best_so_far_is_taken(model, clock, lines, seconds):
    choice = choose(model, replace(AUTO, measure_seconds=seconds), 3, What(5))
    rows = {candidate.label: candidate for candidate in choice.candidates}
    assert choice.label == WINDOWS[0]
    assert rows[WINDOWS[0]].outcome == "measured"
    assert rows["jacobi"] == Candidate("jacobi", "not tried: out of time")
    assert "jacobi not tried: out of time" in lines()[0]
    assert [label for label, _ in clock.runs].count("jacobi") == 0


def test_preparing_a_candidate_is_not_measuring_it(model, clock, monkeypatch):
    class Slow(auto.Sampler):
        def __init__(self, *args) -> None:
            super().__init__(*args)
            clock.now += 1e6

    monkeypatch.setattr(auto, "Sampler", Slow)
    _, rows = measured(model, clock, replace(AUTO, measure_seconds=1e4))
    assert not [candidate.outcome for candidate in rows.values() if "out of time" in candidate.outcome]


def test_quick_runs_are_repeated_and_the_fastest_counts(model, clock):
    clock.costs = dict.fromkeys((*WINDOWS, "cached_sequential"), 1.0)
    seconds = iter((0.25, 0.125, 0.25, 0.375, 0.25, 0.125))

    def noisy(solution):
        clock.costs["jacobi"] = next(seconds) / int(solution.iterations.max())

    clock.spoil["jacobi"] = noisy
    _, rows = measured(model, clock)
    assert rows["jacobi"].seconds_per_image == pytest.approx(0.25 / 3)
    assert len([label for label, _ in clock.runs if label == "jacobi"]) == 5


# -- what is kept --------------------------------------------------------------------------------------------------


@pytest.fixture
def again(model, clock, monkeypatch):
    """Choose as a new process would, without running anything; returns the choice and whether it was measured."""

    def measure(contest, solvers):
        clock.runs.append(contest)
        return [Candidate(label, "measured", clock.costs.get(label, 1.0), equal=True) for label in solvers]

    def choose_again(options=AUTO, model=model, batch_size=3, what=What(5)):  # noqa: B008
        monkeypatch.setattr(auto, "_chosen", {})
        clock.runs.clear()
        choice = choose(model, options, batch_size, what)
        return choice, bool(clock.runs)

    monkeypatch.setattr(auto._Contest, "measure", measure)
    return choose_again


def test_a_measurement_is_kept(again, clock, folder, lines):
    clock.costs = {"jacobi": 1e-3}
    first, _ = again()
    clock.costs = {WINDOWS[1]: 1e-3}
    second, ran = again()
    assert not ran
    assert second.solver == first.solver == SolverOptions(name="jacobi")
    assert second.candidates == first.candidates
    (path,) = folder.iterdir()
    assert second.kept_in == str(path)
    assert lines()[1] == f"{lines()[0]} (measured earlier; solver.remeasure=true measures again)"
    assert json.loads(path.read_text())["about"]["batch_size"] == 3


def test_it_holds_for_other_seeds_weights_and_measuring_times(again, model):
    again()
    assert not again(what=What(6))[1]
    assert not again(options=replace(AUTO, measure_seconds=1.0))[1]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.01)
    assert not again()[1]


def test_it_does_not_hold_for_anything_else(again, model, folder, monkeypatch):
    again()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    given = [
        Given(torch.zeros(1, 1, 8, 8, dtype=torch.uint8), mask.index_fill(0, torch.arange(n), True)) for n in (2, 4)
    ]
    for other in (
        {"batch_size": 2},
        {"what": What(5, SamplingOptions(coupling="inverse_cdf"))},
        {"what": What(5, SamplingOptions(temperature=0.5))},
        {"what": What(5, given=given[0])},
        {"what": What(5, given=given[1])},
        {"options": replace(AUTO, certify=False)},
        {"options": replace(AUTO, absolute_tolerance=1.0)},
        {"model": pixelcnnpp((1, 8, 8), filters=8)},
        {"model": pixelcnnpp((1, 8, 12))},
    ):
        assert again(**other)[1], other
    number = len(list(folder.iterdir()))
    assert again(model=model.double())[1]
    model.float()
    for what, value in (("lit_parallel.environment.metadata.version", "0.0.0"), ("torch.get_num_threads", 99)):
        with monkeypatch.context() as patched:
            patched.setattr(what, lambda *_, value=value: value)
            assert again()[1], what
    assert len(list(folder.iterdir())) == number + 3
    assert not again()[1]


def test_it_can_be_measured_again(again, clock, model):
    clock.costs = {"jacobi": 1e-3}
    again()
    clock.costs = {WINDOWS[1]: 1e-3}
    assert again(replace(AUTO, remeasure=True))[0].label == WINDOWS[1]
    choice, ran = again()
    assert (choice.label, ran) == (WINDOWS[1], False)
    choose(model, replace(AUTO, remeasure=True), 3, What(5))  # in the same process too
    assert clock.runs


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: "",
        lambda text: text[:100],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "\udcff",
        lambda text: text.replace('"chosen": "jacobi"', '"chosen": "newton"'),
        lambda text: text.replace('"candidates": [', '"candidates": [3, '),
        lambda text: text.replace('"label": "jacobi"', '"name": "jacobi"'),
        lambda text: text.replace('"label": "jacobi"', '"label": "newton"'),
        lambda text: text.replace('"seconds_per_image": ', '"seconds_per_image": "long", "iterations_mean": '),
    ],
)
def test_an_unreadable_file_is_told_and_written_anew(again, clock, folder, lines, spoil):
    clock.costs = {"jacobi": 1e-3}
    again()
    (path,) = folder.iterdir()
    text = path.read_text()
    path.write_text(spoil(text), errors="surrogateescape")
    assert path.read_bytes() != text.encode()
    choice, ran = again()
    assert ran
    assert choice.label == "jacobi"
    assert lines()[1].startswith(f"solver auto: cannot read '{path}' (")
    assert lines()[1].endswith("so solvers are measured again.")
    assert [each.name for each in folder.iterdir()] == [path.name]
    assert json.loads(path.read_text())["chosen"] == "jacobi"
    assert not again()[1]


def test_where_nothing_can_be_kept_the_choice_holds_for_this_process(model, clock, folder, lines):
    folder.parent.mkdir(parents=True)
    folder.write_text("a file where a folder should be")
    choice = choose(model, AUTO, 3, What(5))
    assert any(line.startswith(f"solver auto: cannot keep what was measured in '{folder}'") for line in lines())
    clock.runs.clear()
    assert choose(model, AUTO, 3, What(5)) is choice
    assert not clock.runs


# -- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["window", "block_size", "max_iterations"])
def test_options_of_a_named_solver_are_refused(model, clock, name):
    options = replace(AUTO, **{name: 4})
    message = f"solver.{name} belongs to a solver that is named, and auto chooses one: leave it out"
    for refuse in (
        lambda: check(options),
        lambda: lit_parallel.sample(model, 2, solver=options),
        lambda: check_sampler(model, options, What()),
    ):
        with pytest.raises(UserError) as error:
            refuse()
        assert str(error.value) == message
    assert not clock.runs


@pytest.mark.parametrize("options", [SolverOptions(measure_seconds=3.0), SolverOptions(remeasure=True)])
def test_options_of_auto_are_refused_by_a_named_solver(options):
    with pytest.raises(UserError, match=r"solver\.\w+ belongs to auto, not to gs_jacobi: leave it out"):
        build_solver(options)


def test_auto_is_no_schedule():
    with pytest.raises(UserError, match="solver auto is for sampling a model: name one of sequential, jacobi"):
        build_solver(AUTO)


def test_a_near_word_is_suggested(model):
    with pytest.raises(UserError, match=r"unknown solver 'autos'. Did you mean 'auto'?"):
        lit_parallel.sample(model, 2, solver="autos")
    with pytest.raises(UserError, match=r"'solver.name' cannot be 'autos'. Did you mean 'auto'?"):
        load_config(SampleConfig, overrides=["solver.name=autos"])
    with pytest.raises(UserError, match=r"'solver.measure_seconds' must be > 0, not 0.0"):
        load_config(SampleConfig, overrides=["solver.name=auto", "solver.measure_seconds=0"])


def test_a_check_measures_nothing(model, clock):
    check_sampler(model, AUTO, What())
    check_sampler(model, "auto", What())
    with pytest.raises(UserError, match="there is no class 3"):
        check_sampler(model, AUTO, What(0, SamplingOptions(label=3)))
    assert not clock.runs


def test_cached_sequential_sampling_is_certified_only_if_asked_for_by_its_options(model):
    for solver, certified in (("cached_sequential", False), (NAMED["cached_sequential"], True)):
        _, solution = lit_parallel.sample(model, 2, solver=solver)
        assert solution.solver == "cached_sequential"
        assert bool(solution.certified.all()) is certified
    with pytest.raises(UserError, match="window belongs to gs_jacobi"):
        lit_parallel.sample(model, 2, solver=SolverOptions(name="cached_sequential", window=3))


# -- windows, processes, grids, commands ---------------------------------------------------------------------------


def test_systems_name_their_windows(model):
    assert model.sampling_system(2, incremental=True).windows == [32, 64]
    assert pixelcnnpp((1, 20, 4)).sampling_system(2, incremental=True).windows == [16, 32, 48, 64]
    made = MadeModule(MadeOptions(hidden_sizes=[8, 8]), (1, 28, 28))
    assert made.sampling_system(2, incremental=True).windows == [112]
    plain = model.sampling_system(2, incremental=False)
    assert isinstance(plain, TriangularSystem)
    assert plain.windows == [plain.window]


@pytest.mark.parametrize("first", [True, False])
def test_every_process_takes_the_first_ones_choice(model, clock, first):
    elsewhere = choose(model, AUTO, 3, What(5))
    clock.runs.clear()
    auto._chosen.clear()
    told = []

    def broadcast(choice):
        told.append(choice)
        return replace(elsewhere, solver=SolverOptions(window=64), label=WINDOWS[1])

    module = SamplingModule(model, replace(AUTO, remeasure=True), 3, What(5))
    module._trainer = SimpleNamespace(is_global_zero=first, strategy=SimpleNamespace(broadcast=broadcast))
    module.on_predict_start()
    assert bool(clock.runs) is first
    assert (told[0] is not None) is first
    assert module.choice.label == WINDOWS[1]
    assert module._sampler.loop.solver.window == 64
    assert module.predict_step([0, 1], 0)[1].solver == "gs_jacobi"


def test_sample_grids_measure_for_the_first_of_them_only(model, clock):
    grid = SampleGrid(replace(AUTO, remeasure=True), every_n_epochs=1, num_samples=2)
    trainer = SimpleNamespace(is_global_zero=True, current_epoch=0, loggers=[], global_step=1)
    grid._draw(trainer, model)
    first = len(clock.runs)
    assert first > 4
    grid._draw(trainer, model)
    assert len(clock.runs) == first + 1


def test_the_choice_is_logged_to_wandb(model, clock):
    choice, rows = measured(model, clock, jacobi=1e-3)
    run = SimpleNamespace(config={}, logged={})
    run.log = run.logged.update
    log_choice(SimpleNamespace(experiment=run), choice)
    assert run.config == {"solver_chosen": {"name": "jacobi", "window": None}}
    table = run.logged["solver_candidates"]
    column = table.columns.index("seconds_per_image")
    assert {row[0]: row[column] for row in table.data} == {row.label: row.seconds_per_image for row in rows.values()}
    run.config.clear()
    log_choice(SimpleNamespace(experiment=run), None)
    log_choice(None, choice)
    assert run.config == {}


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("fastest", ["jacobi", "cached_sequential"])
def test_the_command_reports_the_choice(tmp_path, clock, fastest):
    config = load_config(TrainConfig, overrides=["model.hidden_sizes=[24,24]"])
    checkpoint = tmp_path / "tiny.ckpt"
    torch.save(as_checkpoint(build_model(config, (1, 4, 5))), checkpoint)
    clock.costs[fastest] = 1e-3

    def run(*solver):
        common = f"checkpoint={checkpoint} output={tmp_path / 'run'} num_samples=3 batch_size=2 compare.repeats=1"
        quiet = "trainer.accelerator=cpu trainer.enable_progress_bar=false wandb.mode=disabled"
        return sample(load_config(SampleConfig, overrides=[*common.split(), *quiet.split(), *solver]))

    results = run("solver.name=auto", "solver.measure_seconds=1e9")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    solver = report["solver"]
    assert solver["asked"] == report["config"]["solver"]["name"] == "auto"
    assert solver["chosen"] == {"name": fastest, "window": None}
    assert solver["measured_earlier"] is False
    labels = [row["label"] for row in solver["candidates"]]
    assert labels == ["gs_jacobi with window 20", "cached_sequential", "jacobi"]
    assert report["solution"]["solver"] == results.solution.solver == fastest
    compared = [row["solver"] for row in report["comparison"]["rows"]]
    assert compared[0] == fastest  # as it was chosen: certified, unlike a baseline of the same name
    assert sorted(compared[1:]) == ["cached_sequential", "sequential"]
    assert report["certified"] is True
    named = run("solver.name=gs_jacobi")
    assert torch.equal(named.images, results.images)
    assert named.report["solver"] == {"asked": "gs_jacobi", "chosen": {"name": "gs_jacobi", "window": None}}
