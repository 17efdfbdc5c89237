"""Every solver over every hand-made system, and the properties that the method rests on."""

import itertools

import pytest
import torch
from hand_made import (
    ALL,
    FunctionSystem,
    alphabet,
    blocks,
    by_hand,
    chain,
    diagonal,
    nilpotent,
    shifted,
    transient_infinities,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_parallel.errors import UserError
from lit_parallel.solution import SolverError, Status
from lit_parallel.solvers import (
    GSJacobi,
    Jacobi,
    JacobiGS,
    Sequential,
    SolverLoop,
    SolverOptions,
    Stopping,
    build_solver,
    solve,
)
from lit_parallel.systems import Evaluation, TriangularSystem, write

SOLVERS = [
    Sequential(),
    Jacobi(),
    JacobiGS(),
    JacobiGS(1),
    JacobiGS(7),
    JacobiGS(100),
    GSJacobi(),
    GSJacobi(1),
    GSJacobi(9),
    GSJacobi(100),
]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: f"{s.name}-{list(vars(s).values())}")


@every_solver
@pytest.mark.parametrize("name", ALL)
def test_every_solver_reproduces_the_sequential_result(name, solver):
    system = ALL[name]()
    solution = solve(system, solver, certify=True, record_residual=True)
    assert torch.equal(solution.value, by_hand(system))
    assert solution.status == [Status.CONVERGED] * system.batch_size
    assert solution.certified.all()
    assert (solution.certificate_iterations == 1).all()
    assert (solution.iterations <= system.length).all()
    assert (solution.frontier == system.length).all()
    assert solution.value.isfinite().all()


@pytest.mark.parametrize(
    ("system", "iterations", "exact_after"),
    [
        (chain(), 12, 12),  # nothing is left to confirm: the last equation is evaluated once, from final inputs
        (diagonal(), 2, 1),
        (blocks(), 5, 4),
        (nilpotent(), 4, 3),
        (diagonal(length=1), 1, 1),
    ],
)
def test_jacobi_iteration_counts_known_by_hand(system, iterations, exact_after):
    solution = solve(system, Jacobi())
    assert solution.iterations.tolist() == [iterations] * system.batch_size
    assert solution.evaluations.tolist() == [iterations * system.length] * system.batch_size
    assert solution.final_iteration is not None
    assert int(solution.final_iteration.max()) == exact_after


def test_iteration_map_of_a_chain_is_its_diagonal():
    solution = solve(chain(batch=1), Jacobi())
    assert solution.final_iteration.tolist() == [list(range(1, 13))]
    windowed = solve(diagonal(batch=1), GSJacobi(5))
    # Windows start at the frontier: 5 exact at once; then the confirmed one moves the window to the next five.
    assert windowed.final_iteration.tolist()[0][:5] == [1] * 5


def test_sequential_counts_and_work():
    solution = solve(chain(), Sequential())
    assert solution.iterations.tolist() == [12] * 3
    assert solution.work.tolist() == [1.0] * 3
    assert solution.iteration_speedup.tolist() == [1.0] * 3


@every_solver
def test_iteration_limit_is_reported_and_the_prefix_is_exact(solver):
    solution = solve(chain(), solver, Stopping(max_iterations=5))
    assert solution.status == [Status.ITERATION_LIMIT] * 3
    assert (solution.iterations == 5).all()
    for sample, frontier in enumerate(solution.frontier.tolist()):
        assert 5 <= frontier < 12
        assert torch.equal(solution.value[sample, :frontier], by_hand(chain())[sample, :frontier])
    with pytest.raises(SolverError, match="3 of 3 samples were not solved; sample 0, equation"):
        solution.raise_if_failed()
    assert not solution.all_solved


def failing(batch: int = 4, length: int = 10, sick: int = 2) -> FunctionSystem:
    """A chain in which equation 4 of one sample takes the logarithm of a negative number."""

    def h(x):
        bad = (torch.arange(batch)[:, None] == sick) & (torch.arange(length) == 4)
        return torch.where(bad, torch.log(-1 - shifted(x)), shifted(x) + 1)

    return FunctionSystem(torch.zeros(batch, length), h)


@every_solver
def test_a_non_finite_sample_ends_alone(solver):
    solution = solve(failing(), solver, certify=True)
    healthy = [0, 1, 3]
    assert solution.status[2] is Status.NON_FINITE
    assert all(solution.status[i] is Status.CONVERGED for i in healthy)
    assert solution.certified.tolist() == [True, True, False, True]
    assert torch.equal(solution.value[healthy], by_hand(chain(3, 10)))
    assert solution.frontier.tolist() == [10, 10, 4, 10]
    assert torch.equal(solution.value[2, :4], by_hand(chain(1, 10))[0, :4])
    assert solution.value.isfinite().all()
    if solution.final_iteration is not None:  # its books were closed when it failed
        assert (solution.final_iteration[2] <= solution.iterations[2]).all()
        assert solution.iterations[2] < solution.iterations[0] or isinstance(solver, JacobiGS)
    with pytest.raises(SolverError, match="1 of 4 samples were not solved; sample 2, equation 4 of 10"):
        solution.raise_if_failed()


def decaying(length: int = 40) -> FunctionSystem:
    """x_t = 0.9 x_{t-1} + 1, from zero: Jacobi's change decays slowly, the error behind it is several times larger."""
    return FunctionSystem(torch.zeros(1, length, dtype=torch.float64), lambda x: 0.9 * shifted(x) + 1)


def test_a_tolerance_bounds_the_change_and_is_not_called_converged():
    solution = solve(decaying(), Jacobi(), Stopping(absolute_tolerance=0.05))
    assert solution.status == [Status.SETTLED]
    assert "not the error" in Status.SETTLED.value
    assert not solution.certified.any()
    error = (solution.value - by_hand(decaying())).abs().max()
    assert error > 0.05
    assert int(solution.iterations) < 40


def test_a_certificate_makes_a_tolerance_exact():
    solution = solve(decaying(), Jacobi(), Stopping(absolute_tolerance=0.05), certify=True)
    assert solution.status == [Status.CONVERGED]
    assert torch.equal(solution.value, by_hand(decaying()))
    assert int(solution.certificate_iterations) > 1
    assert float(solution.iteration_speedup) == 40 / int(solution.iterations + solution.certificate_iterations)


def test_relative_tolerance_scales_with_the_value():
    def large(x):
        return 1e6 * (1 + 0.5 * shifted(x) / 1e6)

    system = FunctionSystem(torch.zeros(1, 60, dtype=torch.float64), large)
    loose = solve(system, Jacobi(), Stopping(relative_tolerance=1e-3))
    strict = solve(system, Jacobi(), Stopping(absolute_tolerance=1e-3))
    assert loose.status == strict.status == [Status.SETTLED]
    assert 8 <= int(loose.iterations) <= 13 < int(strict.iterations)  # 0.5^k < 1e-3 at k = 10


class WrongFastPath(TriangularSystem):
    """A fast evaluation that is a little wrong; its reference is right."""

    def __init__(self, reference):
        self.plain = reference
        self.length, self.batch_size, self.device = reference.length, reference.batch_size, reference.device

    def new_state(self):
        return self.plain.new_state()

    def reset(self, state, value=None):
        self.plain.reset(state, value)

    def evaluate(self, state, equations, frontier, running):
        new = self.plain.function(state) * (1 + 1e-12)
        return write(state, None, new, self.plain.guess, running)

    def value(self, state):
        return self.plain.value(state)

    def reference(self):
        return self.plain


def test_the_certificate_repairs_a_wrong_fast_path_and_says_so():
    plain = decaying()
    assert not torch.equal(solve(WrongFastPath(plain), Jacobi()).value, by_hand(plain))
    solution = solve(WrongFastPath(plain), Jacobi(), certify=True)
    assert torch.equal(solution.value, by_hand(plain))
    assert solution.certified.all()
    assert int(solution.certificate_iterations) > 1


def test_a_fast_path_that_hides_a_failure_is_found_out():
    class Hiding(WrongFastPath):
        def evaluate(self, state, equations, frontier, running):
            return write(state, None, self.plain.function(state).nan_to_num(), self.plain.guess, running)

    solution = solve(Hiding(failing()), Jacobi(), certify=True)
    assert solution.status[2] is Status.NON_FINITE
    assert solution.frontier.tolist() == [10, 10, 4, 10]
    assert solution.certified.tolist() == [True, True, False, True]


def test_a_result_that_cannot_be_certified_is_not_called_certified():
    solution = solve(chain(), Jacobi(), Stopping(max_iterations=3), certify=True)
    assert solution.status == [Status.ITERATION_LIMIT] * 3
    assert not solution.certified.any()


def test_evaluating_more_than_asked_is_counted_as_work():
    solution = solve(WrongFastPath(chain()), GSJacobi(3))
    assert (solution.evaluations == solution.iterations * 12).all()


def test_a_loop_runs_again_with_other_inputs():
    offset = torch.ones(2, 8)
    system = FunctionSystem(torch.zeros(2, 8), lambda x: shifted(x) + offset)
    loop = SolverLoop(system, Jacobi(), certify=True)
    first = loop.run().value
    offset.fill_(2.0)
    assert torch.equal(loop.run().value, 2 * first)


def test_starting_from_the_solution_takes_one_iteration():
    system = alphabet()
    assert (solve(system, Jacobi(), start=by_hand(system)).iterations == 1).all()


def test_observer_sees_every_iterate_and_the_residual_is_the_forward_difference():
    iterates = []
    solution = solve(
        decaying(), Jacobi(), Stopping(max_iterations=6), record_residual=True, observer=lambda k, x: iterates.append(x)
    )
    differences = [float((b - a).abs().max()) for a, b in itertools.pairwise(iterates)]
    assert torch.allclose(solution.residual[:, 0].double(), torch.tensor(differences).double())
    assert len(iterates) == 7


def test_integers_have_distances_too():
    system = FunctionSystem(torch.zeros(1, 4, dtype=torch.int64), lambda x: shifted(x) + 100)
    assert solve(system, Jacobi(), Stopping(absolute_tolerance=1)).value.tolist() == [[100, 200, 300, 400]]


@every_solver
def test_a_tolerance_does_not_turn_a_transient_into_a_failure(solver):
    """x_0 moves by less than the tolerance, and until then x_1 = 1 / x_0 is infinite."""

    def h(x):
        return torch.stack([torch.full_like(x[:, 0], 0.05), 1 / x[:, 0], x[:, 1] + 1], dim=1)

    system = FunctionSystem(torch.zeros(2, 3), h)
    solution = solve(system, solver, Stopping(absolute_tolerance=0.1))
    assert solution.all_solved
    torch.testing.assert_close(solution.value, torch.tensor([[0.05, 20.0, 21.0]]).expand(2, 3))


@every_solver
def test_negative_zero_is_a_value_of_its_own(solver):
    def h(x):
        return torch.stack([torch.full_like(x[:, 0], -0.0), torch.copysign(torch.ones_like(x[:, 0]), x[:, 0])], dim=1)

    system = FunctionSystem(torch.tensor([[0.0, 1.0]]), h)
    assert solve(system, solver, certify=True).value[0, 1] == -1


def test_a_start_that_is_not_finite_does_no_harm():
    start = torch.full((3, 12), 2.0)
    start[:, 1] = float("nan")
    assert torch.equal(solve(transient_infinities(), Jacobi(), start=start).value, by_hand(transient_infinities()))


@pytest.mark.parametrize("guess", [torch.zeros(0, 3), torch.zeros(2, 0), torch.zeros(4), torch.full((1, 2), torch.nan)])
def test_a_guess_that_is_no_guess_is_refused(guess):
    with pytest.raises(ValueError, match="initial guess"):
        FunctionSystem(guess, lambda x: x)


def test_a_function_of_another_type_is_refused():
    with pytest.raises(TypeError, match="must agree"):
        solve(FunctionSystem(torch.zeros(1, 3), lambda x: x.double()), Jacobi())


def test_the_certificate_counts_in_work_and_time():
    solution = solve(blocks(), Jacobi(), certify=True)
    assert solution.work.tolist() == [6.0] * 3  # 5 iterations over all equations, and one evaluation more
    assert solution.seconds > solution.certificate_seconds > 0
    plain = solve(blocks(), Jacobi())
    assert plain.certificate_seconds == 0
    assert not plain.certified.any()


def test_jacobi_gs_takes_about_the_square_root_by_default():
    assert JacobiGS().equations(chain(length=100), None, 3).tolist() == list(range(3, 100, 10))


def test_residuals_of_a_finished_sample_are_zero():
    short_and_long = FunctionSystem(torch.zeros(2, 8), lambda x: torch.stack([torch.ones(8), shifted(x)[1] + 1]))
    residual = solve(short_and_long, Jacobi(), record_residual=True).residual
    assert residual[:, 0].tolist() == [1.0] + [0.0] * 7
    assert residual[:, 1].tolist() == [1.0] * 8


# -- properties --------------------------------------------------------------------------------------------------

systems = st.builds(
    alphabet,
    batch=st.integers(1, 4),
    length=st.integers(1, 24),
    seed=st.integers(0, 10_000),
    levels=st.integers(2, 5),
    density=st.sampled_from([0.05, 0.3, 1.0]),
)
solvers = st.one_of(st.just(Jacobi()), st.builds(JacobiGS, st.integers(1, 26)), st.builds(GSJacobi, st.integers(1, 26)))


@settings(max_examples=150, deadline=None)
@given(systems, solvers)
def test_always_the_sequential_result_in_at_most_as_many_iterations_as_equations(system, solver):
    solution = solve(system, solver)
    assert torch.equal(solution.value, by_hand(system))
    assert (solution.iterations <= system.length).all()
    assert solution.status == [Status.CONVERGED] * system.batch_size


@settings(max_examples=60, deadline=None)
@given(systems, solvers, st.integers(0, 10_000))
def test_the_solution_does_not_depend_on_the_start(system, solver, seed):
    start = torch.randint(0, 9, system.guess.shape, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(solve(system, solver, start=start).value, by_hand(system))


@settings(max_examples=60, deadline=None)
@given(systems)
def test_prefix_property_after_k_jacobi_iterations_k_equations_are_exact(system):
    exact = by_hand(system)

    def check(k, x):
        assert torch.equal(x[:, :k], exact[:, :k])

    solve(system, Jacobi(), observer=check)


@settings(max_examples=60, deadline=None)
@given(systems, solvers)
def test_the_frontier_never_runs_ahead_of_the_truth(system, solver):
    exact = by_hand(system)
    for limit in range(1, system.length + 1):
        solution = solve(system, solver, Stopping(max_iterations=limit))
        for sample, frontier in enumerate(solution.frontier.tolist()):
            assert frontier >= limit
            assert torch.equal(solution.value[sample, :frontier], exact[sample, :frontier])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), solvers, st.sampled_from([0.0, 0.05]))
def test_a_sample_does_not_depend_on_its_neighbours(seed, solver, tolerance):
    generator = torch.Generator().manual_seed(seed)
    weights = (torch.rand(14, 14, generator=generator, dtype=torch.float64) - 0.5).tril(-1)
    offsets = torch.randn(5, 14, generator=generator, dtype=torch.float64) * torch.tensor(
        [[1.0], [0], [9], [1e-2], [3]]
    )
    stopping = Stopping(absolute_tolerance=tolerance)

    def system(rows):
        # Sums in a fixed order, so that the arithmetic of a sample does not depend on the batch either.
        return FunctionSystem(
            torch.zeros(len(rows), 14, dtype=torch.float64),
            lambda x: (x[:, None, :] * weights).cumsum(dim=2)[:, :, -1] + offsets[rows],
        )

    together = solve(system(list(range(5))), solver, stopping)
    for i in range(5):
        alone = solve(system([i]), solver, stopping)
        assert torch.equal(alone.value[0], together.value[i])
        assert alone.iterations[0] == together.iterations[i]
        assert alone.evaluations[0] == together.evaluations[i]
        assert alone.status[0] == together.status[i]
        assert alone.frontier[0] == together.frontier[i]
        if alone.final_iteration is not None:
            assert torch.equal(alone.final_iteration[0], together.final_iteration[i])


# -- options -----------------------------------------------------------------------------------------------------


def test_options_name_the_solver():
    assert isinstance(build_solver(SolverOptions(name="jacobi_gs", block_size=4)), JacobiGS)
    assert build_solver(SolverOptions(name="gs_jacobi", window=3)).window == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (SolverOptions(name="jakobi"), "Did you mean 'jacobi'"),
        (SolverOptions(name="jacobi", window=3), "solver.window belongs to gs_jacobi"),
        (SolverOptions(name="gs_jacobi", block_size=3), "solver.block_size belongs to jacobi_gs"),
        (SolverOptions(name="jacobi_gs", block_size=0), "block_size must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build_solver(options)


@pytest.mark.parametrize(
    "arguments", [{"max_iterations": 0}, {"absolute_tolerance": -1.0}, {"relative_tolerance": float("nan")}]
)
def test_stopping_refuses_impossible_values(arguments):
    with pytest.raises(UserError, match=next(iter(arguments))):
        Stopping(**arguments)


def test_a_system_without_sizes_refuses_a_relative_tolerance():
    class Sizeless(WrongFastPath):
        def evaluate(self, state, equations, frontier, running):
            evaluation = super().evaluate(state, equations, frontier, running)
            return Evaluation(evaluation.equations, evaluation.change)

    with pytest.raises(UserError, match="no relative tolerance"):
        solve(Sizeless(chain()), Jacobi(), Stopping(relative_tolerance=0.1))


def test_a_system_that_is_not_triangular_is_named():
    system = FunctionSystem(torch.zeros(2, 4), lambda x: 1 - x)  # every equation reads itself
    solution = solve(system, Jacobi(), certify=True)
    assert solution.status == [Status.NOT_TRIANGULAR] * 2
    assert not solution.certified.any()
    short = solve(system, Jacobi(), Stopping(max_iterations=2))
    assert short.status == [Status.ITERATION_LIMIT] * 2  # too early to tell


def test_the_map_counts_on_where_the_certificate_repairs():
    exact = chain(batch=2, length=5)

    class Rough(FunctionSystem):
        """A fast path that gets the last equation wrong."""

        def reference(self):
            return exact

    rough = Rough(exact.guess, lambda x: exact.function(x) + torch.tensor([0, 0, 0, 0, 0.5]))
    solution = solve(rough, Jacobi(), certify=True)
    assert torch.equal(solution.value, by_hand(exact))
    assert solution.certified.all()
    assert solution.iterations.tolist() == [5, 5]
    assert solution.final_iteration.tolist() == [[1, 2, 3, 4, 6]] * 2


class SelfSettling(FunctionSystem):
    """A chain whose samples are settled, by the system's own measure, once x_t reaches t, for t = 3, 5 and never."""

    def evaluate(self, state, equations, frontier, running):
        evaluation = super().evaluate(state, equations, frontier, running)
        evaluation.settled = torch.stack([state[i, min(t, 11)] >= t for i, t in enumerate((3, 5, 20))])
        return evaluation

    def reference(self):
        return chain()


@pytest.mark.parametrize("solver", [Jacobi(), GSJacobi(4)], ids=lambda s: s.name)
def test_a_system_may_settle_its_samples_itself(solver):
    system = SelfSettling(chain().guess, chain().h)
    solution = solve(system, solver)
    assert solution.iterations.tolist() == [3, 5, 12]  # after k iterations x_t is min(k, t + 1)
    assert solution.status == [Status.SETTLED, Status.SETTLED, Status.CONVERGED]  # the last never: it is exact instead
    assert solution.all_solved
    assert solution.frontier.tolist() == [3, 5, 12]
    for sample, frontier in enumerate(solution.frontier.tolist()):
        assert torch.equal(solution.value[sample, :frontier], by_hand(chain())[sample, :frontier])
    certified = solve(system, solver, certify=True)
    assert torch.equal(certified.value, by_hand(chain()))
    assert certified.status == [Status.CONVERGED] * 3


def test_a_failed_sample_does_not_count_as_settled():
    class Settled(FunctionSystem):
        def evaluate(self, state, equations, frontier, running):
            evaluation = super().evaluate(state, equations, frontier, running)
            evaluation.settled = torch.ones(4, dtype=torch.bool) & (frontier >= 4)
            return evaluation

    solution = solve(Settled(failing().guess, failing().h), Jacobi())
    assert solution.status == [Status.SETTLED, Status.SETTLED, Status.NON_FINITE, Status.SETTLED]
    assert solution.iterations.tolist() == [5, 5, 5, 5]
