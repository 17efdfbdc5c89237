"""PixelCNNppModule under Lightning: it learns, initialises once, evaluates reproducibly, and its checkpoints reload."""

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

import lit_parallel.modules.pixelcnnpp
from lit_parallel.checkpoint import build_model, load
from lit_parallel.config import TrainConfig, from_container
from lit_parallel.errors import UserError
from lit_parallel.modules.options import PixelCNNppOptions
from lit_parallel.modules.pixelcnnpp import PixelCNNppModule
from lit_parallel.sampling.autoregressive import AutoregressiveSystem
from lit_parallel.sampling.pixelcnnpp import IncrementalPixelCNNppSystem
from lit_parallel.sampling.sampler import Sampler

SHAPE = (1, 4, 8)

pytestmark = [
    # Lightning's advice for real training, beside the point for so few pixels.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]


def images(number: int) -> torch.Tensor:
    """Images with structure to learn: a dark left half, a bright right half, some noise."""
    base = torch.tensor([30] * 4 + [200] * 4).expand(SHAPE)
    return (base + torch.randint(-8, 8, (number, *SHAPE))).to(torch.uint8)


def loader(number: int = 32, batch_size: int = 8) -> DataLoader:
    """Images of four classes, which differ in brightness."""
    labels = torch.arange(number) % 4
    return DataLoader(TensorDataset(images(number) + 10 * labels[:, None, None, None].byte(), labels), batch_size)


def config(**model) -> TrainConfig:
    small = {"name": "pixelcnnpp", "filters": 6, "resnets": 1, "mixtures": 2, "dropout": 0.0, "initial_images": 20}
    return from_container(TrainConfig, {"model": {**small, **model}, "optimizer": {"lr": 5e-3, "warmup_fraction": 0}})


def module(shape=SHAPE, **options) -> PixelCNNppModule:
    model = build_model(config(**options), shape)
    assert isinstance(model, PixelCNNppModule)
    return model


def trainer(tmp_path, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in options.get("callbacks", ()))}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet, **checkpoints, **options)


def fit(tmp_path, model, epochs: int = 1, *, ckpt_path=None, callbacks=(), **options) -> pl.Trainer:
    """Train on 32 images in batches of 8; leaves ``last.ckpt``."""
    last = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0)
    options = {"num_sanity_val_steps": 0, **options}
    fitter = trainer(tmp_path, max_epochs=epochs, callbacks=[last, *callbacks], **options)
    fitter.fit(model, loader(), loader(12), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return fitter


def likelihood(model: PixelCNNppModule, labels: torch.Tensor | None = None) -> torch.Tensor:
    batch = images(4)
    with torch.no_grad():
        return model.eval().log_likelihood(batch, torch.rand(batch.shape), labels)


class Recorder(pl.Callback):
    """Notes the losses and the size of every gradient that reaches the optimiser."""

    def __init__(self) -> None:
        self.bits: list[float] = []
        self.gradients: list[float] = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        found = [parameter.grad.norm() for parameter in pl_module.parameters() if parameter.grad is not None]
        if found:
            self.gradients.append(float(torch.stack(found).norm()))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.bits.append(float(trainer.callback_metrics["train/bits_per_dim"]))


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_training_lowers_the_bits_in_every_precision(tmp_path, precision):
    recorder = Recorder()
    model = module()
    dtypes = set()
    original = model.conditional.log_prob
    model.conditional.log_prob = lambda p, x: dtypes.add((p.dtype, x.dtype)) or original(p, x)
    fit(tmp_path, model, 12, callbacks=[recorder], precision=precision)
    assert all(map(math.isfinite, recorder.bits))
    assert recorder.bits[0] > 7
    assert 4 - 0.1 < sum(recorder.bits[-4:]) / 4 < recorder.bits[0] - 1  # every pixel takes 16 values, equally often
    wide = torch.float64 if precision == "64-true" else torch.float32
    assert dtypes == {(wide, wide)}  # the likelihood never sees half precision
    assert model.network.output.bias.dtype == wide


def test_gradients_are_clipped(tmp_path):
    free, clipped = Recorder(), Recorder()
    fit(tmp_path, module(), callbacks=[free])
    fit(tmp_path, module(), callbacks=[clipped], gradient_clip_val=0.05)
    assert max(free.gradients) > 0.1
    assert clipped.gradients
    assert max(clipped.gradients) < 0.0501


def test_the_bits_are_those_of_a_calculation_by_hand(tmp_path):
    model, data = module(), loader(12)
    found = trainer(tmp_path).validate(model, data, verbose=False)
    assert trainer(tmp_path).test(model, data, verbose=False)[0]["test/bits_per_dim"] == found[0]["val/bits_per_dim"]
    total = 0.0
    with torch.no_grad():
        for batch, _ in data:
            parameters = model.network(batch / 127.5 - 1).permute(0, 2, 3, 1)
            total -= float(model.conditional.log_prob(parameters, batch.permute(0, 2, 3, 1).float()).sum())
    assert found[0]["val/bits_per_dim"] == pytest.approx(total / (12 * 32) / math.log(2), rel=1e-5)


def test_a_colour_pixel_counts_three_values(tmp_path):
    model = module((3, 4, 4))
    batch = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    data = DataLoader(TensorDataset(batch, torch.zeros(5)), 5)
    found = trainer(tmp_path).validate(model, data, verbose=False)[0]["val/bits_per_dim"]
    with torch.no_grad():
        parameters = model.network(batch / 127.5 - 1).permute(0, 2, 3, 1)
    nats = -model.conditional.log_prob(parameters, batch.permute(0, 2, 3, 1).float())
    assert nats.shape == (5, 4, 4)
    assert found == pytest.approx(float(nats.sum()) / (5 * 48) / math.log(2), rel=1e-5)


def test_the_likelihood_of_8_bit_pixels_needs_no_noise():
    model, batch = module(), images(4)
    first, second = (model.log_likelihood(batch, torch.rand(batch.shape)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (4,)


# -- initialisation ---------------------------------------------------------------------------------------------------


@pytest.fixture
def initialisations(monkeypatch):
    """The inputs of every initialisation."""
    seen: list[tuple] = []
    original = lit_parallel.modules.pixelcnnpp.initialise_from_data
    monkeypatch.setattr(
        lit_parallel.modules.pixelcnnpp,
        "initialise_from_data",
        lambda network, *inputs: seen.append(inputs) or original(network, *inputs),
    )
    return seen


def test_training_begins_with_one_initialisation_from_the_first_images(tmp_path, initialisations):
    model = module()
    assert not model.initialised
    trainer(tmp_path).validate(module(), loader(), verbose=False)
    assert not initialisations
    torch.manual_seed(1)
    fit(tmp_path, model)
    (inputs,) = initialisations
    torch.manual_seed(1)
    expected = next(iter(loader(32, 32)))[0][:20]  # model.initial_images, out of three batches
    torch.testing.assert_close(inputs[0], expected / 127.5 - 1)
    assert inputs[1] is None
    assert model.initialised
    fit(tmp_path, model)
    assert len(initialisations) == 1


def test_a_class_conditional_network_is_initialised_with_the_labels(tmp_path, initialisations):
    fit(tmp_path, module(num_classes=4))
    assert initialisations[0][1].tolist() == [index % 4 for index in range(20)]


def test_checkpoints_keep_what_was_initialised(tmp_path, initialisations):
    model = module()
    fit(tmp_path, model)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert checkpoint["state_dict"]["initialised"]
    resumed = module()
    fit(tmp_path, resumed, 2, ckpt_path=tmp_path / "last.ckpt")
    assert len(initialisations) == 1
    assert resumed.initialised
    loaded = load(tmp_path / "last.ckpt").train()
    fit(tmp_path, loaded)  # further training of a loaded model
    assert len(initialisations) == 1


def test_resumed_training_goes_on_where_it_stopped(tmp_path):
    start = {name: value.clone() for name, value in module().state_dict().items()}
    data, path = loader(), tmp_path / "first.ckpt"

    def bits(epochs: int, **resume) -> list[float]:
        model, recorder = module(), Recorder()
        model.load_state_dict(start)
        model.optimizer_options.final_lr_fraction = 1.0  # the same rates however many epochs there are
        fitter = trainer(tmp_path, max_epochs=epochs, callbacks=[recorder], num_sanity_val_steps=0)
        fitter.fit(model, data, data, **resume)
        fitter.save_checkpoint(path)
        return recorder.bits

    whole = bits(2)
    assert bits(1) == whole[:4]
    assert bits(2, ckpt_path=path, weights_only=True) == whole[4:]


# -- checkpoints and averages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_classes", [None, 4])
def test_a_checkpoint_reloads_without_running_code_from_it(tmp_path, num_classes):
    model = module(num_classes=num_classes)
    fit(tmp_path, model)
    loaded = load(tmp_path / "last.ckpt")
    assert isinstance(loaded, PixelCNNppModule)
    assert not loaded.training
    assert loaded.options == model.options
    labels = None if num_classes is None else torch.arange(4)
    torch.manual_seed(2)
    expected = likelihood(model, labels)
    torch.manual_seed(2)
    assert torch.equal(likelihood(loaded, labels), expected)


def test_averaged_weights_are_validated_and_saved(tmp_path):
    class Observer(pl.Callback):
        """Averages by hand: the first update takes the weights as they are, each later one half of them."""

        average: list[torch.Tensor] | None = None
        validated: list[torch.Tensor]

        def on_train_batch_end(self, trainer, pl_module, *_):
            weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
            before = self.average or weights
            self.average = [(a + b) / 2 for a, b in zip(before, weights, strict=True)]

        def on_validation_batch_end(self, trainer, pl_module, *_):
            self.validated = [parameter.detach().clone() for parameter in pl_module.parameters()]
            assert pl_module.initialised

    observer = Observer()
    model = module()
    fit(tmp_path, model, 2, callbacks=[observer, EMAWeightAveraging(decay=0.5, use_buffers=False)])
    loaded = load(tmp_path / "last.ckpt")
    assert loaded.initialised
    for saved, validated, expected in zip(loaded.parameters(), observer.validated, observer.average, strict=True):
        assert torch.equal(saved, validated)
        torch.testing.assert_close(saved, expected)


# -- classes and sizes ------------------------------------------------------------------------------------------------


def test_classes_are_learnt(tmp_path):
    model = module(num_classes=4)
    fit(tmp_path, model, 8)
    batch, labels = next(iter(loader(32, 32)))
    with torch.no_grad():
        right, wrong = (model.eval().log_likelihood(batch, batch, label) for label in (labels, labels.roll(2)))
    assert (right != wrong).all()
    assert right.mean() > wrong.mean()


class FourClasses(pl.LightningDataModule):
    num_classes = 4

    def train_dataloader(self):
        return loader()

    def val_dataloader(self):
        return loader(4)


@pytest.mark.parametrize(("num_classes", "fits"), [(None, True), (4, True), (5, True), (3, False)])
def test_too_few_classes_are_refused_in_one_line(tmp_path, num_classes, fits):
    fitter = trainer(tmp_path, max_epochs=1)
    if fits:
        fitter.fit(module(num_classes=num_classes), FourClasses())
        return
    with pytest.raises(UserError, match=r"the data have 4 classes: set model\.num_classes=4, not 3") as error:
        fitter.fit(module(num_classes=num_classes), FourClasses())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 6, 8), (3, 8, 10)])
def test_sizes_that_do_not_fit_are_refused_in_one_line(shape):
    with pytest.raises(UserError, match="1 or 3 channels .* multiples of 4, not " + "x".join(map(str, shape))) as error:
        PixelCNNppModule(PixelCNNppOptions(), shape)
    assert "\n" not in str(error.value)


# -- sampling ---------------------------------------------------------------------------------------------------------


def test_windows_and_cached_sequential_sampling_are_evaluated_from_caches():
    model = module()
    assert model.incremental
    kinds = {name: type(Sampler(model, name, 1).system) for name in ("gs_jacobi", "cached_sequential", "jacobi")}
    assert kinds["gs_jacobi"] is kinds["cached_sequential"] is IncrementalPixelCNNppSystem
    assert kinds["jacobi"] is AutoregressiveSystem
    # The user's own network in its place has no layers that one could walk.
    model.network = torch.nn.Sequential(model.network)
    assert not model.incremental
    assert type(Sampler(model, "gs_jacobi", 1).system) is AutoregressiveSystem
    with pytest.raises(UserError, match="has no evaluation from caches"):
        Sampler(model, "cached_sequential", 1)


# -- compilation ------------------------------------------------------------------------------------------------------


def test_a_compiled_network_is_used_in_training_only(tmp_path, monkeypatch):
    model = module()
    uses: list[bool] = []
    compiled: list = []

    def compile_(function):
        compiled.append(function)

        def run(*inputs):
            uses.append(model.training)
            return function(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compile_)
    names = list(model.state_dict())
    fit(tmp_path, model)
    assert not compiled
    model.compile_network = True
    fitter = fit(tmp_path, model)
    assert compiled == [model.network.forward]
    assert uses == [True] * 4
    fitter.validate(model, loader(), verbose=False)
    assert len(uses) == 4
    assert list(model.state_dict()) == names
