"""The DenseNet under Lightning: what is built, what it reads, what it measures, and where its weights come from."""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lit_parallel.modules.densenet as densenet_module
from lit_parallel.checkpoint import build_model, load
from lit_parallel.config import TrainConfig, from_container
from lit_parallel.data.augmentation import random_crop, random_crop_and_flip
from lit_parallel.data.datasets import build_data
from lit_parallel.data.options import DATA_OPTIONS, ImageFolderOptions
from lit_parallel.errors import UserError
from lit_parallel.modules.densenet import DenseNetModule
from lit_parallel.modules.made import MadeModule
from lit_parallel.modules.options import MadeOptions, OptimizerOptions

COLOUR, GREY = (3, 8, 8), (1, 8, 8)
TINY = {"architecture": "custom", "growth_rate": 4, "block_config": [2, 2]}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]


def module(shape=COLOUR, optimizer=None, **options) -> DenseNetModule:
    model = {"name": "densenet", **(TINY if "architecture" not in options else {}), **options}
    constant = {"lr": 0.05, "warmup_fraction": 0.0, "final_lr_fraction": 1.0}
    config = from_container(TrainConfig, {"model": model, "optimizer": {**constant, **(optimizer or {})}})
    return build_model(config, shape)


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        module(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def batch(number=16, shape=COLOUR, classes=10):
    return torch.randint(0, 256, (number, *shape), dtype=torch.uint8), torch.arange(number) % classes


def fit(model, tmp_path, epochs=1, number=32, **options) -> pl.Trainer:
    """Train on dark and bright images, told apart by their labels; leaves ``last.ckpt``."""
    labels = torch.arange(number) % 2
    images = (50 + 150 * labels[:, None, None, None] + torch.randint(-40, 40, (number, *COLOUR))).to(torch.uint8)
    last = ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0, enable_version_counter=False)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        callbacks=[last],
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )
    loader = DataLoader(TensorDataset(images, labels), 8)
    trainer.fit(model, loader, loader)
    return trainer


# -- what is built ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape", "layers", "kernel", "classes"),
    [
        ({"architecture": "densenet121"}, (3, 64, 64), (6, 12, 24, 16), 7, 1000),
        ({"architecture": "densenet121"}, (3, 32, 32), (6, 12, 24, 16), 3, 1000),
        ({"architecture": "densenet121", "small_images": False, "num_classes": 7}, (3, 32, 32), (6, 12, 24, 16), 7, 7),
        ({"architecture": "cifar", "depth": 22}, (3, 32, 32), (3, 3, 3), 3, 10),
        ({"architecture": "cifar", "depth": 22, "growth_rate": 4}, (3, 96, 96), (3, 3, 3), 3, 10),
        (TINY, (1, 28, 28), (2, 2), 3, 10),
        (TINY, (1, 64, 64), (2, 2), 7, 10),
    ],
)
def test_the_options_say_which_network(options, shape, layers, kernel, classes):
    model = module(shape, **options)
    blocks = [child for name, child in model.network.features.named_children() if name.startswith("denseblock")]
    assert tuple(map(len, blocks)) == layers
    assert model.network.features.conv0.kernel_size == (kernel, kernel)
    assert model.network.features.conv0.in_channels == shape[0]
    assert model.network.classifier.out_features == model.num_classes == classes
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, *shape, dtype=torch.uint8)).shape == (1, classes)


def test_growth_compression_and_drop_rate_reach_the_network():
    network = module(growth_rate=6, block_config=[2, 3], compression=1.0, drop_rate=0.25, architecture="custom").network
    assert network.features.conv0.out_channels == 12
    assert network.features.transition1.conv.out_channels == 12 + 2 * 6
    assert network.features.denseblock1.denselayer1.drop_rate == 0.25
    assert module().network.features.transition1.conv.out_channels == (8 + 2 * 4) // 2
    paper = module((3, 32, 32), architecture="cifar").network
    assert (paper.features.conv0.out_channels, len(paper.features.denseblock1)) == (24, 16)  # 100 layers, growth 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "densenet121", "depth": 40}, "model.depth belongs to model.architecture=cifar: leave it out"),
        ({"architecture": "densenet121", "growth_rate": 4}, "model.growth_rate belongs to model.architecture=cifar or"),
        ({"architecture": "cifar", "block_config": [2]}, "model.block_config belongs to model.architecture=custom"),
        ({"architecture": "cifar", "compression": 0.5}, "model.compression belongs to model.architecture=custom"),
        ({"architecture": "custom"}, "needs the layers of each block: set model.block_config=[3,3,3]"),
        ({"pretrained": True}, "no weights are published for model.architecture=custom"),
        ({"architecture": "densenet121", "pretrained": True}, "not for small images: set model.small_images=false"),
        ({"architecture": "densenet121", "pretrained": True, "weights": "x"}, "name two sets of weights"),
        (
            {"architecture": "densenet121", "pretrained": True, "small_images": False, "shape": GREY},
            "the published weights read 3 colours, and the images have 1",
        ),
        ({"architecture": "densenet121", "small_images": False, "shape": (3, 28, 28)}, "halves them 5 times"),
        ({"shape": (3, 1, 9)}, "images of 1x9 pixels are too small"),
        ({"optimizer": {"momentum": 0.9}}, "optimizer.momentum and nesterov belong to sgd"),
        ({"optimizer": {"nesterov": True}}, "optimizer.momentum and nesterov belong to sgd"),
        ({"optimizer": {"name": "sgd", "nesterov": True}}, "optimizer.nesterov needs a momentum"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(options, message):
    assert message in refusal(**options)


def test_a_model_of_images_refuses_numbers():
    config = from_container(TrainConfig, {"model": {"name": "densenet"}, "data": {"name": "adding"}})
    with pytest.raises(UserError, match=r"model.name=densenet is a model of images"):
        build_model(config, (6, 2))


# -- what it reads ----------------------------------------------------------------------------------------------------


def test_pixels_are_normalized_as_imagenets():
    images, _ = batch()
    mean, deviation = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - mean[channel]) / deviation[channel]
        torch.testing.assert_close(module().normalized(images)[:, channel].double(), expected, rtol=1e-5, atol=1e-5)
    grey = module(GREY)
    torch.testing.assert_close(
        grey.normalized(images[:, :1]), (images[:, :1] / 255 - 0.449) / 0.226, rtol=1e-5, atol=1e-5
    )
    assert grey.double().normalized(images[:, :1]).dtype == torch.float64


def test_only_the_network_is_in_the_state_dict():
    assert all(name.startswith("network.") for name in module().state_dict())


def test_logits_are_the_networks_and_never_half_precision():
    model, (images, _) = module().eval(), batch()
    assert torch.equal(model(images), model.network(model.normalized(images)))
    assert model.bfloat16()(images).dtype == torch.float32


@pytest.mark.parametrize(("chosen", "expected"), [(None, False), (False, False), (True, True)])
def test_channels_last(chosen, expected, tmp_path):
    model, (images, _) = module(channels_last=chosen), batch()
    fit(model, tmp_path)
    for tensor in (model.normalized(images), model.network.features.denseblock1.denselayer1.conv2.weight):
        assert tensor.is_contiguous(memory_format=torch.channels_last) == expected
    plain = module(channels_last=False)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(images), plain.eval()(images), rtol=1e-4, atol=1e-5)
    assert model.channels_last_on(torch.device("cuda")) == (chosen is not False)


# -- augmentation -----------------------------------------------------------------------------------------------------


class Seen(nn.Module):
    """Notes what the network is given."""

    def __init__(self, network):
        super().__init__()
        self.network, self.inputs = network, []

    def forward(self, x):
        self.inputs.append(x)
        return self.network(x)


@pytest.mark.parametrize("augment", [True, False])
def test_training_alone_changes_the_images(augment):
    model, (images, labels) = module(augment=augment), batch()
    model.augmentation = lambda images: 255 - images
    model.network = Seen(model.network)
    model.log_dict = model.log = lambda *_, **__: None
    model.training_step((images, labels), 0)
    model.eval()
    model.validation_step((images, labels), 0)
    model.test_step((images, labels), 0)
    wanted = [255 - images if augment else images, images, images]
    for found, expected in zip(model.network.inputs, wanted, strict=True):
        assert torch.equal(found, model.normalized(expected))


def test_the_data_know_what_keeps_a_class():
    for name, expected in (("mnist5k", random_crop), ("cifar10", random_crop_and_flip)):
        model = module()
        model.check_data(build_data(DATA_OPTIONS[name](name=name), seed=0))
        assert model.augmentation is expected
    assert module(GREY).augmentation is random_crop
    assert module().augmentation is random_crop_and_flip


def test_a_folder_of_images_is_augmented_where_it_is_read(tmp_path):
    (tmp_path / "val" / "a").mkdir(parents=True)
    data = build_data(ImageFolderOptions(folder=str(tmp_path)), seed=0)
    model, (images, _) = module(), batch()
    model.check_data(data)
    assert model.augmentation(images) is images
    with pytest.raises(UserError, match=r"model.augment is not for data.name=image_folder: .* data.augment=false"):
        module(augment=False).check_data(data)


def test_more_classes_than_outputs():
    with pytest.raises(UserError, match=r"the data have 10 classes: set model.num_classes=10, not 4"):
        module(num_classes=4).check_data(build_data(DATA_OPTIONS["mnist5k"](), seed=0))


# -- what it measures -------------------------------------------------------------------------------------------------


def test_accuracies_are_torchmetrics():
    logits, labels = torch.randn(300, 10), torch.randint(10, (300,))
    measured = module().eval().measure(logits, labels)
    for name, k in (("accuracy", 1), ("top5", 5)):
        expected = MulticlassAccuracy(10, top_k=k, average="micro")(logits, labels)
        torch.testing.assert_close(measured[name].mean(), expected)


@pytest.mark.parametrize(("classes", "metrics"), [(5, ("loss", "accuracy")), (6, ("loss", "accuracy", "top5"))])
def test_five_guesses_are_counted_where_there_are_more_classes(classes, metrics):
    model = module(num_classes=classes)
    assert model.metrics == metrics
    assert tuple(model.measure(torch.randn(4, classes), torch.arange(4))) == metrics


def test_labels_are_smoothed_in_training_alone():
    model = module(label_smoothing=0.3)
    logits, labels = torch.randn(7, 10), torch.arange(7)
    log_p = logits.log_softmax(dim=1)
    hard = -log_p[torch.arange(7), labels]
    torch.testing.assert_close(model.measure(logits, labels)["loss"], 0.7 * hard - 0.3 * log_p.mean(dim=1))
    torch.testing.assert_close(model.eval().measure(logits, labels)["loss"], hard)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
def test_it_learns(precision, tmp_path):
    trainer = fit(module(num_classes=2, augment=False), tmp_path, epochs=6, precision=precision)
    assert trainer.callback_metrics["val/accuracy"] == 1
    assert trainer.callback_metrics["val/loss"] < 0.3


def test_the_same_seed_trains_the_same_weights(tmp_path):
    found = []
    for _ in range(2):
        pl.seed_everything(3, verbose=False)
        model = module(num_classes=2, drop_rate=0.1)
        fit(model, tmp_path)
        found.append(model.network.classifier.weight.detach().clone())
    assert torch.equal(*found)


# -- the optimiser ----------------------------------------------------------------------------------------------------


def optimizer_of(model, tmp_path):
    return fit(model, tmp_path).optimizers[0].param_groups[0]


def test_momentum_reaches_sgd(tmp_path):
    options = {"name": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    group = optimizer_of(module(num_classes=2, optimizer=options), tmp_path)
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, True, 1e-4)
    group = optimizer_of(module(num_classes=2, optimizer={"name": "sgd"}), tmp_path)
    assert (group["momentum"], group["nesterov"]) == (0, False)


def test_momentum_is_refused_by_every_model_without_sgd():
    with pytest.raises(UserError, match="belong to sgd"):
        MadeModule(MadeOptions(hidden_sizes=[4]), (1, 2, 2), OptimizerOptions(momentum=0.5))


# -- where the weights come from --------------------------------------------------------------------------------------


def forbidden(*_):
    raise AssertionError("weights were asked for")


def test_a_checkpoint_reloads(tmp_path):
    model = module(num_classes=2)
    fit(model, tmp_path)
    loaded, (images, _) = load(tmp_path / "last.ckpt"), batch()
    assert torch.equal(loaded(images), model.eval()(images))


@pytest.mark.parametrize("weights", [{"pretrained": True}, {"weights": "lost.pth"}])
def test_a_checkpoint_needs_no_other_weights(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(densenet_module, "load_published", forbidden)
    options = {"architecture": "densenet121", "small_images": False, "num_classes": 2, **weights}
    model = module((3, 32, 32), **options)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, tmp_path / "a.ckpt")
    loaded = load(tmp_path / "a.ckpt")
    assert torch.equal(loaded.network.classifier.weight, model.network.classifier.weight)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"architecture": "densenet121", "small_images": False, "pretrained": True}, "densenet121"),
        ({"weights": "mine.pth"}, "mine.pth"),
        ({}, None),
    ],
)
def test_initial_weights_are_loaded_when_they_are_asked_for(options, expected, monkeypatch):
    asked = []
    monkeypatch.setattr(densenet_module, "load_published", lambda network, name: asked.append((network, name)))
    model = module((3, 32, 32), **options)
    assert model.initial_weights == expected
    assert asked == []
    model.load_initial_weights()
    assert asked == ([] if expected is None else [(model.network, expected)])
