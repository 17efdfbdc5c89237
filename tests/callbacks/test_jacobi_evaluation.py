"""Validation, test and prediction with the callback are what they are without it, only that networks go another way."""

import copy
import logging
import math
import pickle
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from test_jacobi_backprop import Memory
from test_train_and_sample import inspect, logged
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from callbacks import JacobiEvaluation
from callbacks.build import build_testing_callbacks, build_training_callbacks
from lit_parallel.checkpoint import build_model
from lit_parallel.config import TrainConfig, load_config
from lit_parallel.dense import DenseOptions, auto, evaluate_in_parallel, records, restore
from lit_parallel.errors import UserError
from lit_parallel.networks.densenet import DenseNet
from train import train

ROOT = Path(__file__).parents[2]
NETWORK = "jacobi_evaluation/{}/inner.net"

pytestmark = [
    # Lightning and wandb open files that the interpreter closes at exit; what they deprecate is theirs.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*(does not have many workers|no `val_dataloader`|smaller than the logging)"),
]


class Classifier(pl.LightningModule):
    """Tells one of seven classes of 8x8 images; notes in which phases its network was parallel."""

    def __init__(self, fail_in=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            network = DenseNet(3, (5, 3), 4, bn_size=2, num_classes=7, small_images=True)
        self.inner = nn.ModuleDict({"net": network})
        self.fail_in = fail_in
        self.parallel_in: set[str] = set()
        self.logits: list[torch.Tensor] = []

    def forward(self, images):
        return self.inner["net"](images)

    def training_step(self, batch, index):
        self._note("training")
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self._evaluate("validation", batch)

    def test_step(self, batch, index):
        self._evaluate("test", batch)

    def predict_step(self, batch, index):
        self._note("predict")
        return self(batch[0])

    def on_validation_end(self):
        self._note("validation end")

    def on_test_end(self):
        self._note("test end")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-2)

    def _evaluate(self, phase, batch):
        self._note(phase)
        logits = self(batch[0])
        self.logits.append(logits.detach().clone())
        self.log(f"{phase}/loss", F.cross_entropy(logits, batch[1]))
        if self.fail_in == phase:
            raise ZeroDivisionError

    def _note(self, phase):
        if "forward" in self.inner["net"].__dict__:
            self.parallel_in.add(phase)


def data(batch_size=4, batches=5, seed=2):
    generator = torch.Generator().manual_seed(seed)
    count = batch_size * batches - 1  # the last batch is smaller
    images = torch.randn(count, 3, 8, 8, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(7, (count,), generator=generator)), batch_size=batch_size)


def trainer_of(callback=None, *, callbacks=(), logger=False, **arguments):
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[*([callback] if callback else []), *callbacks],
        logger=logger,
        **{"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False},
        **({"max_epochs": 2} | arguments),
    )


def exact(**chosen):
    return JacobiEvaluation(**({"solver": "gs_jacobi", "stop": "exact", "probe_every": 0} | chosen))


def is_parallel(model):
    return "forward" in model.inner["net"].__dict__


# -- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_training_and_validation_are_as_without(precision):
    results = []
    for callback in (None, exact(solver="jacobi")):
        model = Classifier()
        trainer = trainer_of(callback, precision=precision)
        trainer.fit(model, data(), data(seed=3))
        assert model.parallel_in == ({"validation"} if callback else set())
        results.append((trainer.callback_metrics["validation/loss"], model.logits, model.state_dict()))
    (expected, expected_logits, expected_weights), (loss, logits, weights) = results
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(logits, expected_logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert list(weights) == list(expected_weights)
    for name, weight in weights.items():
        assert torch.equal(weight, expected_weights[name]), name


@pytest.mark.parametrize("phase", ["validate", "test", "predict"])
def test_every_kind_of_evaluation(phase):
    model, x = Classifier(), data()
    expected = [model.eval()(images).detach() for images, _ in x]
    trainer = trainer_of(exact())
    found = getattr(trainer, phase)(model, x, **({} if phase == "predict" else {"verbose": False}))
    assert model.parallel_in == {"validate": {"validation"}, "test": {"test"}, "predict": {"predict"}}[phase]
    for ours, theirs in zip(found if phase == "predict" else model.logits, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert not is_parallel(model)


def test_metrics_are_those_of_the_parallel_forward():
    model, x = Classifier(), data()
    evaluate_in_parallel(model.eval(), solver="jacobi", iterations=1, probe_every=0)
    with torch.no_grad():
        expected = [model(images) for images, _ in x]
    restore(model)
    trainer = trainer_of(JacobiEvaluation(solver="jacobi", iterations=1, probe_every=0))
    trainer.test(model, x, verbose=False)
    for ours, theirs in zip(model.logits, expected, strict=True):
        assert torch.equal(ours, theirs)
    losses = torch.stack([F.cross_entropy(logits, labels) for logits, (_, labels) in zip(expected, x, strict=True)])
    sizes = torch.tensor([float(len(labels)) for _, labels in x])
    torch.testing.assert_close(trainer.callback_metrics["test/loss"], (losses * sizes).sum() / sizes.sum())


def test_with_a_weight_average(monkeypatch):
    monkeypatch.setattr(auto, "kernels_run_on", lambda device: True)  # which keep copies of weights
    results = []
    for callback in (None, JacobiEvaluation(solver="sequential", probe_every=0)):
        average = WeightAveraging(avg_fn=lambda averaged, current, _: averaged.lerp(current, 0.5), use_buffers=False)
        model = Classifier()
        trainer = trainer_of(callback, callbacks=[average], max_epochs=3)
        trainer.fit(model, data(), data(seed=3))
        results.append(model.logits)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


# -- the module before, meanwhile and afterwards ----------------------------------------------------------------------


def outline(model):
    parts = {name: (type(part), list(part.__dict__)) for name, part in model.inner.named_modules()}
    return parts, {name: id(x) for name, x in model.state_dict(keep_vars=True).items()}


def test_the_module_is_restored():
    model = Classifier()
    before = outline(model)
    trainer_of(exact()).fit(model, data(), data())
    assert outline(model) == before
    assert model.parallel_in == {"validation"}  # its own on_validation_end sees it restored
    copy.deepcopy(model)


@pytest.mark.parametrize("failure", ["validation", "test", "another callback", "validation in fit"])
def test_the_module_is_restored_after_an_exception(failure):
    class Failing(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            assert is_parallel(pl_module)
            raise ZeroDivisionError

    others = [Failing()] if failure == "another callback" else []
    model = Classifier(fail_in=failure.split()[0])
    before = outline(model)
    trainer = trainer_of(exact(), callbacks=others)
    run = {"validation in fit": trainer.fit, "test": trainer.test}.get(failure, trainer.validate)
    loaders = [data()] * (2 if failure == "validation in fit" else 1)
    with pytest.raises(ZeroDivisionError):
        run(model, *loaders)
    assert outline(model) == before


def test_what_is_parallel_already_is_refused_and_stays_so():
    model = Classifier()
    evaluate_in_parallel(model, solver="jacobi")
    with pytest.raises(UserError, match=r"'inner.net' is parallel already"):
        trainer_of(exact()).validate(model, data(), verbose=False)
    assert is_parallel(model)


def test_checkpoints_know_nothing_of_it(tmp_path):
    class Saving(pl.Callback):
        def on_validation_batch_end(self, trainer, *_):
            trainer.save_checkpoint(tmp_path / "meanwhile.ckpt")

    model = Classifier()
    names = list(model.state_dict())
    trainer_of(exact(), callbacks=[Saving()]).fit(model, data(), data(batches=1))
    content = torch.load(tmp_path / "meanwhile.ckpt", weights_only=True)
    assert list(content["state_dict"]) == names
    assert "JacobiEvaluation" not in content["callbacks"]


def test_what_was_learnt_is_kept_from_epoch_to_epoch_but_not_the_weights(monkeypatch):
    monkeypatch.setattr(auto, "kernels_run_on", lambda device: True)
    made = []
    adopt = auto.Fused.adopt
    monkeypatch.setattr(auto.Fused, "adopt", lambda self, *given: made.append(self) or adopt(self, *given))
    model = Classifier()
    agreement = Memory()
    callback = JacobiEvaluation(solver="sequential", probe_every=1)
    trainer_of(callback, max_epochs=3, logger=agreement).fit(model, data(), data())
    assert len(made) == 1
    errors = [value for values in agreement.steps.values() for name, value in values.items() if "logit" in name]
    assert len(errors) == 3
    assert max(errors) < 1e-4
    assert callback._known == {}


# -- what it says -----------------------------------------------------------------------------------------------------


@pytest.fixture
def said(caplog):
    with caplog.at_level(logging.INFO):
        yield lambda: [line.getMessage() for line in caplog.records if "JacobiEvaluation: " in line.getMessage()]


def of(memory, part):
    """What was logged of a part, by step, without the prefix."""
    prefix = NETWORK.format(part)
    found = {
        step: {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}
        for step, values in memory.steps.items()
    }
    return {step: values for step, values in found.items() if values}


def test_what_is_logged(said):
    memory = Memory()
    trainer_of(JacobiEvaluation(solver="jacobi", probe_every=2), logger=memory).fit(Classifier(), data(), data())
    found = of(memory, "val")
    assert list(found) == [4, 9]  # where Lightning logs what it has validated; not the sanity check
    for values in found.values():
        assert (values["/plain"], values["/fused"], values["/ordinary"]) == (1, 0, 0)
        assert (values["/top1_agreement"], values["/top5_agreement"]) == (1, 1)
        assert 0 <= values["/relative_logit_error"] < 1e-2
        assert values["/wall_clock_speedup"] > 0
        for block, layers in ((1, 5), (2, 3)):
            prefix = f".features.denseblock{block}/"
            assert 2 <= values[prefix + "iterations_mean"] <= values[prefix + "iterations_max"] <= layers
            assert 1 < values[prefix + "work"] <= layers
    (line,) = said()
    assert line.startswith("JacobiEvaluation: inner.net: jacobi, ")
    assert " parallel iterations for 5 + 3 layers on average; when compared with the ordinary forward, " in line
    assert line.endswith(" times as fast.")


def test_numbers_are_means_over_images(monkeypatch):
    taken, compared = [], []
    note = JacobiEvaluation._note

    def noted(self, module):
        note(self, module)
        record = records(module)["inner.net"]
        taken.append(record.blocks[0].iterations)
        compared.append(record)

    monkeypatch.setattr(JacobiEvaluation, "_note", noted)
    memory = Memory()
    trainer_of(JacobiEvaluation(solver="jacobi", tolerance=0.3, probe_every=2), logger=memory).test(
        Classifier(), data(), verbose=False
    )
    (values,) = of(memory, "test").values()
    iterations = torch.cat(taken).double()
    assert len(iterations) == 19
    assert len(iterations.unique()) > 1
    assert values[".features.denseblock1/iterations_mean"] == pytest.approx(float(iterations.mean()))
    assert values[".features.denseblock1/iterations_max"] == float(iterations.max())
    assert values[".features.denseblock1/work"] == pytest.approx(float(iterations.mean()))  # Jacobi: all, every time
    probes = [record for record in compared if record.speedup is not None]
    assert len(probes) == 3
    assert values["/relative_logit_error"] == max(record.relative_logit_error for record in probes)
    assert values["/wall_clock_speedup"] == sorted(record.speedup for record in probes)[1]


def test_numbers_of_several_processes_are_those_of_all(monkeypatch):
    shown = []

    def gather(found, mine):  # the other process needs one iteration more for every image, and errs more
        theirs = pickle.loads(pickle.dumps(mine))
        for tally in theirs.values():
            tally["iterations"] = {block: [n + 1 for n in numbers] for block, numbers in tally["iterations"].items()}
            tally["probes"] = [replace(probe, relative_logit_error=0.5) for probe in tally["probes"]]
            tally["ways"] = Counter(ordinary=3)
        shown.append(copy.deepcopy(mine["inner.net"]))
        found[:] = [mine, theirs]

    both = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 2, all_gather_object=gather)
    monkeypatch.setattr("callbacks.jacobi_evaluation.distributed", both)
    memory = Memory()
    trainer_of(JacobiEvaluation(solver="jacobi", tolerance=0.3, probe_every=2), logger=memory).test(
        Classifier(), data(), verbose=False
    )
    (values,) = of(memory, "test").values()
    mine = torch.cat(shown[0]["iterations"]["features.denseblock1"]).double()
    assert values[".features.denseblock1/iterations_mean"] == pytest.approx(float(mine.mean()) + 0.5)
    assert values[".features.denseblock1/iterations_max"] == float(mine.max()) + 1
    assert values["/relative_logit_error"] == 0.5
    assert values["/plain"] == 5 / 8


def test_without_probes_nothing_is_compared(said):
    memory = Memory()
    trainer_of(JacobiEvaluation(solver="jacobi", probe_every=0), logger=memory).test(
        Classifier(), data(), verbose=False
    )
    (values,) = of(memory, "test").values()
    assert not {"/top1_agreement", "/relative_logit_error", "/wall_clock_speedup"} & values.keys()
    (line,) = said()
    assert line.endswith(" layers on average.")


def test_where_the_ordinary_forward_is_taken(said):
    memory = Memory()
    trainer_of(JacobiEvaluation(), logger=memory).test(Classifier(), data(), verbose=False)
    (values,) = of(memory, "test").values()
    assert values == {"/plain": 0, "/fused": 0, "/ordinary": 1}
    assert said() == ["JacobiEvaluation: inner.net: ordinary forward throughout."]


def test_a_network_that_is_not_asked_has_nothing_to_tell(said):
    model, memory = Classifier(), Memory()
    model.inner["unused"] = copy.deepcopy(model.inner["net"])
    trainer_of(exact(), logger=memory).test(model, data(), verbose=False)
    assert not any("unused" in name for values in memory.steps.values() for name in values)
    assert [line.split(":")[1] for line in said()] == [" inner.net"]


def test_batches_in_which_a_network_is_not_asked_do_not_count(monkeypatch):
    class Sometimes(Classifier):
        def test_step(self, batch, index):
            if index % 2 == 0:
                super().test_step(batch, index)

    counted = []
    monkeypatch.setattr("callbacks.jacobi_evaluation._Tally.add", lambda self, record: counted.append(record))
    trainer_of(exact()).test(Sometimes(), data(), verbose=False)
    assert len(counted) == 3


# -- options and modules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"solver": "jacoby"}, "Did you mean 'jacobi'?"),
        ({"tolerence": 1e-3}, "There is no option 'tolerence' of parallel evaluation. Did you mean 'tolerance'?"),
    ],
)
def test_wrong_options_are_told_before_anything_runs(chosen, message):
    with pytest.raises(UserError) as caught:
        JacobiEvaluation(**chosen)
    assert message in str(caught.value)


def test_options_as_an_object():
    memory = Memory()
    callback = JacobiEvaluation(DenseOptions(solver="jacobi", iterations=2, probe_every=0))
    trainer_of(callback, logger=memory).test(Classifier(), data(), verbose=False)
    assert of(memory, "test")[0][".features.denseblock1/iterations_max"] == 2


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (nn.Conv2d(3, 7, 8), "and Classifier has convolutions but no dense block: leave it out"),
        (nn.Linear(8, 7), "and Classifier has none: leave it out"),
    ],
)
def test_a_module_without_a_dense_block_is_refused(network, message):
    model = Classifier()
    model.inner["net"] = network
    with pytest.raises(UserError, match="JacobiEvaluation needs a DenseNet") as caught:
        trainer_of(exact()).test(model, data(), verbose=False)
    assert message in str(caught.value)
    with pytest.raises(UserError, match="needs a DenseNet"):
        exact().check(model)


def test_a_module_whose_dense_nets_are_unusual_is_refused():
    model = Classifier()
    model.inner["net"].features.denseblock1.denselayer1.add_module("squeeze", nn.Linear(2, 2))
    with (
        pytest.warns(UserWarning, match="squeeze"),
        pytest.raises(UserError, match=r"none of the DenseNets of Classifier \(inner.net\)"),
    ):
        exact().check(model)


# -- the command ------------------------------------------------------------------------------------------------------

TINY = [
    *("model.growth_rate=4", "model.block_config=[3,2]", "data.side=7", "data.evaluation_batch_size=100"),
    *("trainer.accelerator=cpu", "trainer.devices=1", "trainer.enable_progress_bar=false"),
    *("trainer.max_epochs=1", "trainer.limit_train_batches=3", "trainer.log_every_n_steps=1"),
]
SWITCHED_ON = ["callbacks.jacobi_evaluation.enabled=true", "callbacks.jacobi_evaluation.solver=jacobi"]


def config_of(name, *overrides):
    return load_config(TrainConfig, ROOT / "configs" / f"{name}.yaml", list(overrides))


def test_the_command_trains_tests_and_logs_to_wandb(tmp_path):
    runs = f"runs_folder={tmp_path}"
    expected = train(config_of("densenet_mnist5k", *TINY, runs, "wandb.mode=disabled"))
    checkpoint = f"checkpoint={expected.checkpoint}"
    trained = train(config_of("densenet_mnist5k", *TINY, *SWITCHED_ON, runs, "wandb.mode=offline"))
    tested = train(
        config_of("densenet_mnist5k", *TINY, *SWITCHED_ON, runs, "stage=test", checkpoint, "wandb.mode=offline")
    )
    for result, part in ((trained, "val"), (trained, "test"), (tested, "test")):
        for name, value in expected.metrics.items():
            if name.startswith(part):
                assert result.metrics[name] == pytest.approx(value, rel=1e-3), name
        found = inspect(result.folder)
        values = logged(found)
        network = f"jacobi_evaluation/{part}/network"
        assert values[f"{network}/plain"] == [1]
        assert values[f"{network}/top1_agreement"] == [1]
        assert 2 <= values[f"{network}.features.denseblock1/iterations_max"][0] <= 3
        curve = values[f"solver/residual/{part}/network.features.denseblock1"]
        assert 2 <= len(curve) <= 3
        assert all(math.isfinite(value) for value in curve)
        assert {1, len(curve)} <= set(values["solver/iteration"])
        drawn = {"name": f"solver/residual/{part}/network.features.denseblock1", "step_metric": "solver/iteration"}
        assert any(drawn.items() <= record["metric"].items() for record in found if "metric" in record)
    saved = load_config(TrainConfig, tested.folder / "config.yaml")
    assert saved.callbacks.jacobi_evaluation.solver == "jacobi"


def test_the_command_refuses_it_on_a_made_before_a_run_folder_exists(tmp_path):
    with pytest.raises(UserError, match=r"MadeModule has none: leave it out") as caught:
        train(config_of("made_mnist5k", SWITCHED_ON[0], f"runs_folder={tmp_path}", "wandb.mode=disabled"))
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("build", [build_training_callbacks, build_testing_callbacks])
def test_options_without_the_switch_are_refused(tmp_path, build):
    options = ["callbacks.jacobi_evaluation.solver=jacobi", f"runs_folder={tmp_path}", "wandb.mode=disabled"]
    config = config_of("densenet_mnist5k", *TINY, *options)
    model = build_model(config, (1, 7, 7))
    arguments = (config, tmp_path, model) if build is build_training_callbacks else (config, model)
    with pytest.raises(UserError) as caught:
        build(*arguments)
    assert str(caught.value) == (
        "Option 'callbacks.jacobi_evaluation.solver' is without effect while 'callbacks.jacobi_evaluation' is not "
        "enabled: set callbacks.jacobi_evaluation.enabled=true, or leave it out."
    )


def test_so_are_those_of_parallel_backpropagation(tmp_path):
    config = config_of("rnn_mnist5k", "callbacks.jacobi_backprop.iterations=30", f"runs_folder={tmp_path}")
    with pytest.raises(UserError, match=r"'callbacks.jacobi_backprop.iterations' is without effect while"):
        train(config)
    assert not any(tmp_path.iterdir())
