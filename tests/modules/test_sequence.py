"""The recurrent models under Lightning: they learn, evaluate correctly, reload, and refuse what does not fit."""

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from lit_parallel.checkpoint import build_model, load
from lit_parallel.config import TrainConfig, from_container
from lit_parallel.data.adding import AddingData
from lit_parallel.data.characters import CharactersData
from lit_parallel.data.options import AddingOptions, CharactersOptions
from lit_parallel.errors import UserError
from lit_parallel.modules.made import MadeModule
from lit_parallel.modules.options import CELLS, MadeOptions, OptimizerOptions
from lit_parallel.modules.sequence import ClassificationModule, NextCharacterModule, NextPixelModule, RegressionModule
from lit_parallel.networks.rnn import Recurrence
from lit_parallel.sampling.causality import check_causality
from lit_parallel.sampling.sampler import sample

IMAGE, NUMBERS, TEXT = (1, 3, 4), (6, 2), (10, 5)
SHAPES = {"next_pixel": IMAGE, "classification": IMAGE, "regression": NUMBERS, "next_character": TEXT}
KINDS = {
    "next_pixel": NextPixelModule,
    "classification": ClassificationModule,
    "regression": RegressionModule,
    "next_character": NextCharacterModule,
}

pytestmark = [
    # Lightning's advice for real training, beside the point for twelve pixels.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]


def module(task="next_pixel", shape=None, optimizer=None, **options):
    model = {"name": "rnn", "task": task, "cell": "gru", "hidden_size": 8, **options}
    constant = {"lr": 0.02, "weight_decay": 0.0, "warmup_fraction": 0.0, "final_lr_fraction": 1.0}
    config = from_container(TrainConfig, {"model": model, "optimizer": {**constant, **(optimizer or {})}})
    return build_model(config, shape or SHAPES[task])


def refusal(*arguments, **options) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(UserError) as caught:
        module(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def loader(task="next_pixel", number=32, batch_size=8) -> DataLoader:
    """Dark and bright images, told apart by their labels; numbers, whose first column adds up to the target; or texts
    in which every character but the first is the one after it in the alphabet.
    """
    if task == "regression":
        numbers = torch.rand(number, *NUMBERS)
        return DataLoader(TensorDataset(numbers, numbers[:, :, 0].sum(dim=1)), batch_size)
    if task == "next_character":
        length, characters = TEXT
        texts = (torch.arange(number)[:, None] + torch.arange(length + 1)).remainder(characters).to(torch.uint8)
        return DataLoader(TensorDataset(texts[:, :-1], texts[:, 1:]), batch_size)
    labels = torch.arange(number) % 2
    images = 50 + 150 * labels[:, None, None, None] + torch.randint(-20, 20, (number, *IMAGE))
    return DataLoader(TensorDataset(images.to(torch.uint8), labels), batch_size)


def trainer(tmp_path, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = {"enable_checkpointing": "callbacks" in options}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet, **checkpoints, **options)


class Losses(pl.Callback):
    """Notes every loss."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def fit(tmp_path, model, task, epochs=1, *, ckpt_path=None, **options) -> list[float]:
    """Train on 32 samples in batches of 8; leaves ``last.ckpt``."""
    recorder = Losses()
    last = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0, enable_version_counter=False)
    fitter = trainer(tmp_path, max_epochs=epochs, num_sanity_val_steps=0, callbacks=[recorder, last], **options)
    data = loader(task)
    fitter.fit(model, data, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return recorder.losses


# -- what is built ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_every_task_has_its_module_and_every_cell_its_network(task, cell):
    model = module(task, cell=cell)
    assert type(model) is KINDS[task]
    assert type(model.network.recurrence) is {"softplus": Recurrence, "lstm": nn.LSTM, "gru": nn.GRU}.get(cell, nn.RNN)
    assert model.network.recurrence.batch_first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "regression", "shape": IMAGE}, "model.task=regression needs sequences of numbers, and the data are"),
        ({"task": "classification", "shape": NUMBERS}, "model.task=classification needs images, and the data are seq"),
        ({"task": "next_pixel", "shape": NUMBERS}, "set data.name=mnist5k, or model.task=regression (of numbers)"),
        ({"task": "next_character", "shape": IMAGE}, "model.task=next_character needs a text, and the data are images"),
        ({"bidirectional": True}, "model.bidirectional would show the network what it is to predict"),
        ({"bidirectional": True, "task": "next_character"}, "model.bidirectional would show the network what it is"),
        ({"num_classes": 3}, "model.num_classes belongs to model.task=classification"),
        ({"cell": "softplus", "layers": 2}, "model.cell=softplus has one layer and one direction"),
        ({"optimizer": {"name": "sgd", "beta1": 0.5}}, "optimizer.beta1 and beta2 belong to adamw"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(options, message):
    assert message in refusal(**options)


def test_a_model_of_images_refuses_numbers():
    with pytest.raises(UserError, match=r"model.name=made is a model of images, and data.name=adding has none"):
        build_model(from_container(TrainConfig, {"data": {"name": "adding"}}), NUMBERS)


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize(
    ("task", "cell"),
    [("next_pixel", "softplus"), ("classification", "lstm"), ("regression", "gru"), ("next_character", "rnn")],
)
def test_training_lowers_the_loss_in_every_precision(tmp_path, task, cell, precision):
    losses = fit(tmp_path, module(task, cell=cell), task, 12, precision=precision)
    assert all(map(math.isfinite, losses))
    part = {"next_pixel": 0.85, "classification": 0.5, "regression": 0.3, "next_character": 0.3}[task]
    assert sum(losses[-4:]) < part * sum(losses[:4])


def test_the_loss_of_pixels_is_their_mean_cross_entropy_in_nats():
    model = module()
    model.log = lambda *_, **__: None
    images, _ = next(iter(loader()))
    levels = images.flatten(1).long()
    with torch.no_grad():
        expected = F.cross_entropy(model.network(levels).flatten(0, 1), levels.flatten())
        torch.testing.assert_close(model.training_step((images, None), 0), expected)
    assert float(expected) == pytest.approx(math.log(256), abs=0.5)


@pytest.mark.parametrize("task", ["classification", "regression", "next_character"])
def test_answers_and_losses_are_never_in_half_precision(task):
    model = module(task).bfloat16()
    samples, targets = loader(task).dataset.tensors
    samples = samples.bfloat16() if task == "regression" else samples
    answers = model(samples)
    assert answers.dtype == torch.float32
    assert model.measure(answers, targets)["loss"].dtype == torch.float32


@pytest.mark.parametrize("task", KINDS)
def test_evaluation_weighs_samples_not_batches_and_leaves_training_possible(tmp_path, task):
    model, data = module(task), loader(task, number=20)  # the last batch holds 4
    found = trainer(tmp_path).validate(model, data, verbose=False)[0]
    tested = trainer(tmp_path).test(model, data, verbose=False)[0]
    assert {name.removeprefix("val/"): value for name, value in found.items()} == {
        name.removeprefix("test/"): value for name, value in tested.items()
    }
    samples, targets = data.dataset.tensors
    with torch.no_grad():
        if task == "next_pixel":
            levels = samples.flatten(1).long()
            nats = F.cross_entropy(model.network(levels).flatten(0, 1), levels.flatten())
            expected = {"val/bits_per_dim": float(nats) / math.log(2)}
        elif task == "classification":
            logits = model.network(samples.flatten(1)[..., None] / 255)
            right = (logits.argmax(dim=1) == targets).float().mean()
            expected = {"val/loss": float(F.cross_entropy(logits, targets)), "val/accuracy": float(right)}
        elif task == "next_character":
            nats = F.cross_entropy(model.network(samples).flatten(0, 1), targets.flatten().long())
            expected = {"val/loss": float(nats), "val/bits_per_character": float(nats) / math.log(2)}
        else:
            expected = {"val/loss": float(F.mse_loss(model.network(samples)[:, 0], targets))}
    assert found == pytest.approx(expected, rel=1e-5)
    assert model.monitor in found
    fit(tmp_path, model, task, inference_mode=False)  # what inference mode has made is not in the way


def test_a_colour_pixel_is_read_at_once_by_a_classifier_and_value_by_value_by_a_predictor():
    images = torch.randint(0, 256, (2, 3, 2, 2), dtype=torch.uint8)
    classifier, predictor = (module(task, (3, 2, 2)) for task in ("classification", "next_pixel"))
    read = classifier.sequences(images)
    assert read.shape == (2, 4, 3)
    torch.testing.assert_close(read[1, 2], images[1, :, 1, 0] / 255)
    assert predictor.length == predictor.positions.length == 12


def test_a_character_is_read_by_its_place_and_predicted_from_those_before_it():
    network = module("next_character", cell="gru").double().network
    text = torch.tensor([[3, 0, 4, 4, 1]], dtype=torch.uint8)
    logits = network(text)
    assert logits.shape == (1, 5, TEXT[1])
    states, _ = network.recurrence(torch.eye(TEXT[1]).double()[[3, 0, 4, 4, 1]][None])
    torch.testing.assert_close(logits, network.output(states))
    text[0, 3] = 2
    assert (network(text) != logits).any(dim=2).tolist() == [[False, False, False, True, True]]


def test_who_knows_nothing_needs_the_logarithm_of_the_number_of_characters(tmp_path):
    model = module("next_character")
    with torch.no_grad():
        model.network.output.weight.zero_()
        model.network.output.bias.zero_()
    found = trainer(tmp_path).test(model, loader("next_character"), verbose=False)[0]
    assert found["test/bits_per_character"] == pytest.approx(math.log2(TEXT[1]))


@pytest.mark.parametrize(
    ("task", "data", "other"),
    [
        ("regression", CharactersData(CharactersOptions(), seed=0), "next_character"),
        ("next_character", AddingData(AddingOptions(), seed=0), "regression"),
    ],
)
def test_numbers_and_characters_are_not_mistaken_for_each_other(task, data, other):
    model = module(task, data.sample_shape)
    with pytest.raises(UserError, match=rf"^data\.name={data.name} is not for model\.task={task}: set .*={other}\.$"):
        model.check_data(data)
    module(other, data.sample_shape).check_data(data)


def test_the_error_is_told_relative_to_that_of_the_mean(tmp_path):
    data = AddingData(AddingOptions(length=6, size=40, test_size=30, batch_size=10), seed=0)
    model = module("regression")
    found = trainer(tmp_path).test(model, data, verbose=False)[0]
    assert found["test/relative_error"] == pytest.approx(6 * found["test/loss"], rel=1e-5)
    with torch.no_grad():  # who always answers 1
        model.network.output.weight.zero_()
        model.network.output.bias.fill_(1.0)
    found = trainer(tmp_path).test(model, data, verbose=False)[0]
    assert found["test/relative_error"] == pytest.approx(1, abs=0.4)


class ThreeClasses(pl.LightningDataModule):
    num_classes = 3

    def train_dataloader(self):
        return loader("classification")

    def val_dataloader(self):
        return loader("classification")


def test_too_few_classes_are_refused_in_one_line(tmp_path):
    fitter = trainer(tmp_path, max_epochs=1)
    with pytest.raises(UserError, match=r"the data have 3 classes: set model\.num_classes=3, not 2"):
        fitter.fit(module("classification", num_classes=2), ThreeClasses())
    assert module("classification", num_classes=3).network.output.out_features == 3
    assert module("classification").network.output.out_features == 10


# -- the optimiser ----------------------------------------------------------------------------------------------------


def test_plain_sgd_takes_the_steps_of_the_papers_setting(tmp_path):
    model = module(optimizer={"name": "sgd", "lr": 0.1})
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.log = lambda *_, **__: None
    images = loader().dataset.tensors[0][:8]
    model.training_step((images, None), 0).backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    del model.log
    data = DataLoader(TensorDataset(images), 8)
    trainer(tmp_path, max_steps=1, num_sanity_val_steps=0).fit(model, data, data)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name] - 0.1 * gradients[name])
    assert type(model.trainer.optimizers[0]) is torch.optim.SGD


def test_weight_decay_reaches_sgd(tmp_path):
    model = MadeModule(MadeOptions(hidden_sizes=[4]), IMAGE, OptimizerOptions(name="sgd", weight_decay=0.25))
    fitter = trainer(tmp_path, max_steps=1)
    fitter.fit(model, loader(), loader())
    assert fitter.optimizers[0].defaults["weight_decay"] == 0.25
    assert fitter.optimizers[0].defaults["momentum"] == 0


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", KINDS)
def test_a_checkpoint_reloads_alone(tmp_path, task):
    model = module(task, cell="lstm", layers=2, dropout=0.5, forget_bias=2.0)
    fit(tmp_path, model, task)
    loaded = load(tmp_path / "last.ckpt")
    assert type(loaded) is KINDS[task]
    assert loaded.options == model.options
    assert not loaded.training
    data = loader(task)
    expected, found = (trainer(tmp_path).validate(m, data, verbose=False) for m in (model, loaded))
    assert found == expected


def test_a_checkpoint_with_the_older_name_of_its_shape_is_read(tmp_path):
    fit(tmp_path, module(), "next_pixel")
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    content["hyper_parameters"]["image_shape"] = content["hyper_parameters"].pop("sample_shape")
    torch.save(content, tmp_path / "older.ckpt")
    assert load(tmp_path / "older.ckpt").image_shape == IMAGE


@pytest.mark.parametrize("task", KINDS)
def test_resumed_training_goes_on_where_it_stopped(tmp_path, task):
    start = module(task).state_dict()

    def losses(epochs, **resume):
        torch.manual_seed(3)
        model = module(task)
        model.load_state_dict(start)
        torch.manual_seed(3)
        return fit(tmp_path, model, task, epochs, **resume)

    whole = losses(2)
    assert losses(1) == whole[:4]
    assert losses(2, ckpt_path=tmp_path / "last.ckpt") == whole[4:]


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["softplus", "lstm"])
def test_a_next_pixel_model_is_causal_and_every_solver_gives_the_same_images(cell):
    model = module(cell=cell).eval()
    check_causality(model)
    images = [sample(model, 3, solver=solver, seed=2)[0] for solver in ("sequential", "jacobi", "gs_jacobi")]
    assert images[0].shape == (3, *IMAGE)
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


# -- compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", KINDS)
def test_a_compiled_network_is_used_in_training_only(tmp_path, monkeypatch, task):
    model = module(task)
    uses: list[bool] = []
    monkeypatch.setattr(torch, "compile", lambda f: lambda *inputs: uses.append(model.training) or f(*inputs))
    model.compile_network = True
    names = list(model.state_dict())
    fit(tmp_path, model, task)
    assert uses == [True] * 4
    assert list(model.state_dict()) == names
