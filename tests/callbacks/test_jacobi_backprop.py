"""Training with the callback is training without it, only that the backward pass is parallel in time."""

import copy
import functools
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.loggers.logger import Logger, rank_zero_experiment
from test_train_and_sample import inspect, logged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from callbacks import JacobiBackprop
from lit_parallel.config import TrainConfig, load_config
from lit_parallel.errors import UserError
from lit_parallel.networks.rnn import build_recurrence
from lit_parallel.recurrent import RecurrentOptions, parallelize, records, restore
from train import train

ROOT = Path(__file__).parents[2]
LENGTH = 48

pytestmark = [
    # Lightning and wandb open files that the interpreter closes at exit; what they deprecate is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|no `val_dataloader`|smaller than the logging)"),
]


class Memory(Logger):
    """Keeps what is logged, by step."""

    def __init__(self):
        super().__init__()
        self.steps: dict[int, dict[str, float]] = {}

    name = version = None

    @property
    @rank_zero_experiment
    def experiment(self):
        return None

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.steps.setdefault(step, {}).update(metrics)


class Reader(pl.LightningModule):
    """Reads sequences ``[batch, time, 2]`` and answers at their end."""

    def __init__(self, cell="lstm", fail_at=None, compiled=False):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.inner = nn.ModuleDict({"recurrence": build_recurrence(cell, 2, 12)})
            self.output = nn.Linear(12, 1)
        self.fail_at, self.compiled = fail_at, compiled
        self.losses: list[float] = []
        self.parallel_in: set[str] = set()

    def answer(self, x):
        return self.output(self.inner["recurrence"](x)[0][:, -1])[:, 0]

    def on_fit_start(self):
        if self.compiled:
            self.answer = torch.compile(self.answer, backend="aot_eager")

    def training_step(self, batch, index):
        self._note("training")
        if index == self.fail_at:
            raise ZeroDivisionError
        loss = (self.answer(batch[0]) - batch[1]).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, index):
        self._note("validation")
        self.log("val/loss", (self.answer(batch[0]) - batch[1]).square().mean())

    def on_train_end(self):
        self._note("end")

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def _note(self, phase):
        if "forward" in self.inner["recurrence"].__dict__:
            self.parallel_in.add(phase)


def data(batch_size=4, batches=6):
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(batch_size * batches, LENGTH, 2, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :, 0].mean(1) + x[:, 0, 1]), batch_size=batch_size)


def fit(model, callback=None, *, loaders=None, callbacks=(), logger=False, **arguments):
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[*([callback] if callback else []), *callbacks],
        logger=logger,
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
        **({"max_epochs": 2} | arguments),
    )
    trainer.fit(model, *(loaders or [data()]))
    return trainer


def both(cell="lstm", options=None, **arguments):
    """Losses and weights of two trainings, without and with the callback."""
    results = []
    for callback in (None, JacobiBackprop(**({"solver": "jacobi_gs", "probe_every": 0} | (options or {})))):
        model = Reader(cell)
        torch.manual_seed(3)
        fit(model, callback, **arguments)
        assert ("training" in model.parallel_in) == (callback is not None)
        results.append((torch.tensor(model.losses), model.state_dict()))
    (expected, expected_weights), (losses, weights) = results
    assert list(weights) == list(expected_weights)
    return SimpleNamespace(expected=expected, losses=losses, expected_weights=expected_weights, weights=weights)


def check_close(trainings, tolerance=1e-5):
    torch.testing.assert_close(trainings.losses, trainings.expected, rtol=tolerance, atol=tolerance)
    for name, weight in trainings.weights.items():
        # Adam divides by the gradient's size, and so magnifies a rounding of what is nearly 0.
        torch.testing.assert_close(weight, trainings.expected_weights[name], rtol=0, atol=100 * tolerance)


@pytest.mark.parametrize("solver", ["jacobi_gs", "two_level", "auto"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "softplus"])
def test_the_loss_curve_is_the_same(cell, solver):
    check_close(both(cell, {"solver": solver}))


def test_few_iterations_train_otherwise():
    # The comparison above can tell a backward pass from another.
    trainings = both(options={"solver": "jacobi", "iterations": 2})
    assert (trainings.losses - trainings.expected).abs().max() > 1e-4


@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.05},
        {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    ],
    ids=["accumulation", "norm", "value"],
)
def test_with_accumulation_and_clipping(arguments):
    check_close(both(**arguments))


def test_with_mixed_precision():
    trainings = both(precision="bf16-mixed")
    torch.testing.assert_close(trainings.losses, trainings.expected, rtol=0.02, atol=0.02)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own, where a graph breaks
def test_a_compiled_network_is_parallel_in_training_and_ordinary_afterwards():
    plain, compiled = Reader(), Reader(compiled=True)
    fit(plain)
    memory = Memory()
    fit(compiled, JacobiBackprop(solver="jacobi_gs", probe_every=0), logger=memory, log_every_n_steps=1)
    assert [values["jacobi_backprop/inner.recurrence/parallel"] for values in memory.steps.values()] == [1] * 12
    torch.testing.assert_close(torch.tensor(compiled.losses), torch.tensor(plain.losses), rtol=1e-5, atol=1e-5)
    x = torch.rand(3, LENGTH, 2)
    torch.testing.assert_close(compiled.answer(x), Reader.answer(compiled, x))
    compiled.answer(x).sum().backward()
    assert not records(compiled)


# -- the module before, meanwhile and afterwards ----------------------------------------------------------------


def outline(model):
    """All that a swap could have changed: the layers' own attributes, and which parameters there are."""
    layers = {name: (type(module), list(module.__dict__)) for name, module in model.inner.named_modules()}
    return layers, {name: id(parameter) for name, parameter in model.named_parameters()}


def test_the_module_is_restored():
    model = Reader()
    before = outline(model)
    fit(model, JacobiBackprop(solver="jacobi_gs"), loaders=[data(), data()])
    assert outline(model) == before
    assert {"training", "end"} - model.parallel_in == {"end"}  # its own on_train_end sees it restored
    copy.deepcopy(model)


@pytest.mark.parametrize("failure", ["training_step", "another callback", "on_fit_start"])
def test_the_module_is_restored_after_an_exception(failure):
    class Failing(pl.Callback):
        def on_validation_end(self, trainer, pl_module):
            raise ZeroDivisionError

    class Early(Failing):
        def on_fit_start(self, trainer, pl_module):
            raise ZeroDivisionError

    others = {"another callback": [Failing()], "on_fit_start": [Early()]}.get(failure, [])
    model = Reader(fail_at=3 if failure == "training_step" else None)
    before = outline(model)
    with pytest.raises(ZeroDivisionError):
        fit(model, JacobiBackprop(solver="jacobi_gs"), loaders=[data(), data()], callbacks=others)
    assert outline(model) == before


def test_the_module_is_restored_when_there_was_nothing_to_train():
    model = Reader()
    before = outline(model)
    fit(model, JacobiBackprop(), max_epochs=0)
    assert outline(model) == before


def test_one_callback_serves_several_trainings():
    callback = JacobiBackprop(solver="jacobi_gs", probe_every=0)
    for cell in ("lstm", "gru"):
        model = Reader(cell)
        fit(model, callback)
        assert "training" in model.parallel_in


def test_what_is_parallel_already_is_refused_and_stays_so():
    model = Reader()
    parallelize(model)
    with pytest.raises(UserError, match="is parallel already"):
        fit(model, JacobiBackprop())
    fit(model)
    assert model.parallel_in == {"training", "end"}
    restore(model)


@pytest.mark.parametrize("saved_with", [True, False])
def test_checkpoints_are_the_same_with_and_without(saved_with, tmp_path):
    def callback(wanted):
        return JacobiBackprop(solver="jacobi_gs", probe_every=0) if wanted else None

    whole = Reader()
    fit(whole, max_epochs=4)
    first = Reader()
    trainer = fit(first, callback(saved_with))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    content = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert list(content["state_dict"]) == list(whole.state_dict())
    assert "JacobiBackprop" not in content["callbacks"]
    second = Reader()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=4,
        callbacks=[callback(True)] if not saved_with else [],
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(second, data(), ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(torch.tensor(second.losses), torch.tensor(whole.losses[12:]), rtol=1e-5, atol=1e-5)


def test_with_a_weight_average():
    def averages():
        return [WeightAveraging(avg_fn=lambda averaged, current, _: averaged.lerp(current, 0.5))]

    arguments = {"loaders": [data(), data()], "max_epochs": 2}
    plain, parallel = Reader(), Reader()
    expected = fit(plain, callbacks=averages(), **arguments).callback_metrics["val/loss"]
    trainer = fit(
        parallel, JacobiBackprop(solver="jacobi_gs", probe_every=0), callbacks=averages(), **arguments
    )  # averaged weights are in place when training has ended
    torch.testing.assert_close(trainer.callback_metrics["val/loss"], expected, rtol=1e-4, atol=1e-6)
    for name, weight in parallel.state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=0, atol=1e-3)
    (average,) = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    assert not any("forward" in module.__dict__ for module in average._average_model.modules())


# -- what it says -----------------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    with caplog.at_level(logging.INFO):
        yield lambda: [line.getMessage() for line in caplog.records if "JacobiBackprop: " in line.getMessage()]


def test_what_is_logged(said):
    memory = Memory()
    fit(
        Reader(),
        JacobiBackprop(solver="jacobi_gs", probe_every=4),
        logger=memory,
        log_every_n_steps=3,
        loaders=[data(), data()],
    )
    steps = {step: values for step, values in memory.steps.items() if any("jacobi" in name for name in values)}
    assert list(steps) == [2, 5, 8, 11]
    for values in steps.values():
        assert values["jacobi_backprop/inner.recurrence/parallel"] == 1
        layer = {
            name.removeprefix("jacobi_backprop/inner.recurrence.l0/"): value
            for name, value in values.items()
            if ".l0/" in name
        }
        assert {"iterations", "sweeps", "residual", "estimated_error", "block", "halo", "rank"} <= layer.keys()
        assert {"forward_ms", "backward_ms"} <= layer.keys()
        assert {"probe_error", "backward_speedup", "step_speedup"} <= layer.keys()
        assert 1 <= layer["iterations"] <= 2 * LENGTH
        assert 0 <= layer["residual"] <= layer["estimated_error"] <= 1e-6
        assert layer["probe_error"] < 1e-5
        assert layer["backward_ms"] > 0
        assert layer["forward_ms"] > 0
    (line,) = said()
    assert line.startswith("JacobiBackprop: inner.recurrence.l0: jacobi_gs, ")
    assert f"parallel iterations for {LENGTH} steps on average; when compared, backward " in line


def test_what_is_logged_of_a_parallel_forward_pass(said):
    memory, model = Memory(), Reader("rnn")
    callback = JacobiBackprop(solver="jacobi_gs", forward=True, block_size=6, tolerance=1e-3, probe_every=0)
    fit(model, callback, logger=memory, log_every_n_steps=3, loaders=[data(), data()])
    steps = [values for values in memory.steps.values() if any("jacobi" in name for name in values)]
    assert len(steps) == 4
    for values in steps:
        layer = {name.rpartition("/")[2]: value for name, value in values.items() if ".l0/forward_" in name}
        assert layer["forward_block"] == 6
        assert layer["forward_iterations"] >= 6 + layer["forward_halo"]
        assert layer["forward_sweeps"] >= 1
        assert 0 <= layer["forward_residual"] <= layer["forward_estimated_error"] <= 1e-3
    (line,) = said()
    assert "; forward pass in " in line


def test_the_loss_curve_is_the_same_with_a_parallel_forward_pass():
    check_close(both("rnn", {"forward": True, "tolerance": 1e-6, "block_size": 2}))


def test_the_mean_of_the_iterations_is_told(said, monkeypatch):
    taken = []
    original = JacobiBackprop.on_train_batch_end

    def on_train_batch_end(self, trainer, module, *arguments):
        original(self, trainer, module, *arguments)
        taken.append(records(module)["inner.recurrence.cell"].iterations)

    monkeypatch.setattr(JacobiBackprop, "on_train_batch_end", on_train_batch_end)
    fit(Reader("softplus"), JacobiBackprop(solver="jacobi_gs", probe_every=0))
    assert len(set(taken)) > 1
    (line,) = said()
    mean = sum(taken) / len(taken)
    assert line == (
        f"JacobiBackprop: inner.recurrence.cell: jacobi_gs, {mean:.1f} parallel iterations for {LENGTH} steps on "
        "average."
    )


def test_unchecked_iterations_have_no_error_to_log():
    memory = Memory()
    fit(Reader(), JacobiBackprop(solver="jacobi", iterations=7, probe_every=0), logger=memory, log_every_n_steps=1)
    values = memory.steps[11]
    prefix = "jacobi_backprop/inner.recurrence.l0/"
    assert values[prefix + "iterations"] == 7
    assert not {prefix + name for name in ("residual", "estimated_error", "probe_error")} & values.keys()


def test_a_layer_on_the_ordinary_path_shows_no_stale_numbers(said, monkeypatch):
    # The ordinary way is found to be faster after four batches.
    calls = []
    monkeypatch.setattr(
        "lit_parallel.recurrent.swap.ParallelForward._take_ordinary", lambda *_: calls.append(0) or len(calls) > 4
    )
    memory = Memory()
    fit(Reader(), JacobiBackprop(solver="jacobi_gs", probe_every=2), logger=memory, log_every_n_steps=1, max_epochs=1)
    layer = "jacobi_backprop/inner.recurrence.l0/"
    for step, values in memory.steps.items():
        parallel = step < 4
        assert values["jacobi_backprop/inner.recurrence/parallel"] == parallel
        assert (layer + "iterations" in values) == parallel
        assert (layer + "backward_ms" in values) == parallel
        assert layer + "step_speedup" in values  # why
    assert sorted(memory.steps) == [0, 1, 2, 3, 4, 5]
    (line,) = said()
    assert " steps on average in 4 of 6 batches, in the others the ordinary backward pass; when compared, " in line


def test_a_layer_that_never_was_parallel_is_named(said):
    memory = Memory()
    fit(Reader(), JacobiBackprop(solver="sequential"), logger=memory, log_every_n_steps=6)
    assert said() == ["JacobiBackprop: inner.recurrence: ordinary backward pass throughout."]
    assert {name: value for name, value in memory.steps[11].items() if "jacobi" in name} == {
        "jacobi_backprop/inner.recurrence/parallel": 0
    }


def test_accumulated_batches_are_logged_once_per_step():
    seen = []

    class Counting(Memory):
        def log_metrics(self, metrics, step=None):
            if any("jacobi" in name for name in metrics):
                seen.append(step)

    fit(
        Reader(),
        JacobiBackprop(solver="jacobi_gs", probe_every=0),
        logger=Counting(),
        log_every_n_steps=1,
        accumulate_grad_batches=3,
        max_epochs=1,
    )
    assert seen == [0, 1]


# -- mistakes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"solvr": "jacobi"}, "There is no option 'solvr'"),
        ({"solver": "jakobi"}, "Option 'solver' cannot be 'jakobi'. Did you mean 'jacobi'?"),
        ({"tolerance": 0.0}, "Option 'tolerance' must be > 0"),
    ],
)
def test_wrong_options_are_told_before_training(chosen, message):
    with pytest.raises(UserError) as caught:
        JacobiBackprop(**chosen)
    assert message in str(caught.value)


def test_options_as_an_object():
    callback = JacobiBackprop(RecurrentOptions(solver="jacobi", iterations=5, probe_every=0))
    memory = Memory()
    fit(Reader(), callback, logger=memory, log_every_n_steps=1)
    assert memory.steps[0]["jacobi_backprop/inner.recurrence.l0/iterations"] == 5


def test_a_module_without_recurrent_layers_is_refused():
    model = Reader()
    model.inner["recurrence"] = nn.Linear(2, 12)
    with pytest.raises(UserError, match=r"needs an nn.RNN, .* Reader has none: leave it out"):
        fit(model, JacobiBackprop())


# -- two processes ----------------------------------------------------------------------------------------------


def test_two_processes(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    plain, parallel = Reader(), Reader()
    fit(plain, loaders=[data(batch_size=8, batches=3)])
    dataset = data(batch_size=8, batches=3).dataset
    callback = JacobiBackprop(solver="jacobi_gs", probe_every=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_spawn",
        max_epochs=2,
        callbacks=[callback, _InParallel()],
        use_distributed_sampler=False,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    )
    trainer.fit(parallel, DataLoader(dataset, batch_size=4, sampler=_EveryOther(dataset)))
    for name, weight in parallel.state_dict().items():
        torch.testing.assert_close(weight, plain.state_dict()[name], rtol=0, atol=1e-3)


class _EveryOther(torch.utils.data.Sampler):
    """Half of the samples to each process, so that both together see the batches of one."""

    def __init__(self, dataset):
        self.indices = range(len(dataset))

    def __iter__(self):
        return iter(self.indices[torch.distributed.get_rank() :: 2])

    def __len__(self):
        return len(self.indices) // 2


class _InParallel(pl.Callback):
    """Fails if a batch went the ordinary way."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        assert records(pl_module)["inner.recurrence.l0"].iterations > 0


# -- the command ------------------------------------------------------------------------------------------------

QUIET = ["trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_progress_bar=false"]
ADDING = [
    *("model.hidden_size=8", "data.length=40", "data.size=100", "data.test_size=20", "data.batch_size=8"),
    *("trainer.max_epochs=1", "trainer.limit_train_batches=6", "trainer.log_every_n_steps=2"),
]
SWITCHED_ON = ["callbacks.jacobi_backprop.enabled=true", "callbacks.jacobi_backprop.solver=two_level"]


def config_of(name, *overrides):
    return load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml", [*QUIET, *overrides])


def test_the_command_trains_and_logs_to_wandb(tmp_path):
    expected = train(config_of("rnn_adding", *ADDING, f"runs_folder={tmp_path}", "wandb.mode=disabled"))
    result = train(
        config_of(
            "rnn_adding",
            *ADDING,
            *SWITCHED_ON,
            "callbacks.jacobi_backprop.probe_every=3",
            f"runs_folder={tmp_path}",
            "wandb.mode=offline",
        )
    )
    for name, value in expected.metrics.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-4), name
    values = logged(inspect(result.folder))
    layer = "jacobi_backprop/network.recurrence.l0"
    assert values["jacobi_backprop/network.recurrence/parallel"] == [1, 1, 1]
    assert len(values[f"{layer}/iterations"]) == 3
    assert all(error <= 1e-6 for error in values[f"{layer}/estimated_error"])
    assert {f"{layer}/{name}" for name in ("probe_error", "backward_speedup", "step_speedup")} <= values.keys()
    saved = load_config(TrainConfig, result.folder / "config.yaml")
    assert saved.callbacks.jacobi_backprop.solver == "two_level"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # see above
def test_the_command_with_compile(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    options = [*ADDING, f"runs_folder={tmp_path}", "wandb.mode=disabled", "compile=true"]
    expected = train(config_of("rnn_adding", *options))
    parallel = ["callbacks.jacobi_backprop.solver=jacobi_gs", "callbacks.jacobi_backprop.probe_every=0"]
    result = train(config_of("rnn_adding", *options, SWITCHED_ON[0], *parallel))
    for name, value in expected.metrics.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-4), name


def test_the_command_refuses_it_on_a_made_before_a_run_folder_exists(tmp_path):
    with pytest.raises(UserError, match=r"MadeModule has none: leave it out") as caught:
        train(config_of("made_mnist5k", SWITCHED_ON[0], f"runs_folder={tmp_path}", "wandb.mode=disabled"))
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())
