"""MadeModule under Lightning: it learns, evaluates reproducibly, cycles its masks, and its checkpoints reload."""

import math

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lit_parallel.modules.made import MadeModule
from lit_parallel.modules.options import MadeOptions, OptimizerOptions
from lit_parallel.sampling.sampler import sample

SHAPE = (1, 3, 4)

pytestmark = [
    # Lightning's advice for real training, beside the point for twelve pixels.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
]


def images(number: int) -> torch.Tensor:
    """Images with structure to learn: a dark left half, a bright right half, some noise."""
    base = torch.tensor([30, 30, 200, 200]).expand(SHAPE)
    return (base + torch.randint(-20, 20, (number, *SHAPE))).to(torch.uint8)


def loader(number: int = 32, batch_size: int = 8) -> DataLoader:
    return DataLoader(TensorDataset(images(number)), batch_size=batch_size)


def made_module(optimizer: OptimizerOptions | None = None, config=None, **options) -> MadeModule:
    return MadeModule(MadeOptions(hidden_sizes=[24, 24], **options), SHAPE, optimizer, config)


def trainer(tmp_path, **options) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = {"enable_checkpointing": "callbacks" in options}
    return pl.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet, **checkpoints, **options)


class Recorder(pl.Callback):
    """Notes the mask and the learning rate of every step."""

    def __init__(self) -> None:
        self.training_masks: list[int] = []
        self.validation_masks: list[int] = []
        self.rates: list[float] = []
        self.optimizer: torch.optim.Optimizer | None = None

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.optimizer = optimizer
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.training_masks.append(pl_module.network.mask_index)

    def on_validation_batch_end(self, trainer, pl_module, *_):
        self.validation_masks.append(pl_module.network.mask_index)


def fit(tmp_path, model: MadeModule, epochs: int, *, ckpt_path=None, callbacks=None, **options) -> Recorder:
    """Train on 32 images in batches of 8; leaves ``last.ckpt``."""
    recorder = Recorder()
    callbacks = callbacks or [ModelCheckpoint(dirpath=tmp_path, save_last=True, save_top_k=0)]
    fitter = trainer(tmp_path, max_epochs=epochs, num_sanity_val_steps=0, callbacks=[recorder, *callbacks], **options)
    fitter.fit(model, loader(), loader(20), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return recorder


# -- learning ------------------------------------------------------------------------------------------------------


@pytest.fixture
def unlogged(monkeypatch):
    """Let ``training_step`` run without a Trainer."""
    monkeypatch.setattr(MadeModule, "log", lambda *_, **__: None)


@pytest.mark.usefixtures("unlogged")
@pytest.mark.parametrize("options", [{}, {"order": "random"}, {"num_masks": 2}], ids=str)
def test_training_steps_lower_the_bits_but_not_below_the_entropy_of_the_data(monkeypatch, options):
    model = made_module(**options)
    steps = iter(range(80))
    monkeypatch.setattr(MadeModule, "global_step", property(lambda _: next(steps)))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for index in range(80):
        loss = model.training_step((images(32),), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()) / math.log(2))
    assert losses[0] > 7
    assert math.log2(40) - 0.1 < sum(losses[-10:]) / 10 < 6.5  # every pixel takes 40 values, equally often


@pytest.mark.usefixtures("unlogged")
def test_the_loss_is_the_mean_negative_log_likelihood_per_pixel():
    model = made_module()
    batch = images(8)
    torch.manual_seed(5)
    loss = model.training_step((batch,), 0)
    torch.manual_seed(5)
    noise = torch.rand(batch.shape)
    torch.testing.assert_close(loss, -model.log_likelihood(batch, noise).mean() / 12)
    assert loss.requires_grad


@pytest.mark.usefixtures("unlogged")
def test_training_noise_is_drawn_anew_for_every_step():
    model = made_module()
    batch = (images(8),)
    assert not torch.equal(model.training_step(batch, 0), model.training_step(batch, 0))


def test_a_likelihood_belongs_to_its_image():
    model = made_module().double()
    batch, noise = images(5), torch.rand(5, *SHAPE, dtype=torch.float64)
    together = model.log_likelihood(batch, noise)
    assert together.shape == (5,)
    alone = torch.cat([model.log_likelihood(batch[i : i + 1], noise[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


# -- evaluation ----------------------------------------------------------------------------------------------------


def test_validation_and_test_are_reproducible_and_weigh_images_not_batches(tmp_path):
    model = made_module()
    data = loader(20, batch_size=8)  # the last batch holds 4
    first = trainer(tmp_path).validate(model, data, verbose=False)
    torch.manual_seed(123)
    again = trainer(tmp_path).validate(model, data, verbose=False)
    assert first == again
    tested = trainer(tmp_path).test(model, data, verbose=False)
    assert tested[0]["test/bits_per_dim"] == first[0]["val/bits_per_dim"]

    total = 0.0
    with torch.no_grad():
        for index, (batch,) in enumerate(data):
            noise = torch.rand(batch.shape, generator=torch.Generator().manual_seed(index))
            total -= float(model.log_likelihood(batch, noise).sum())
    assert first[0]["val/bits_per_dim"] == pytest.approx(total / 20 / 12 / math.log(2), rel=1e-5)


def test_masks_cycle_in_training_and_evaluation_uses_the_first(tmp_path):
    model = made_module(num_masks=3)
    recorder = fit(tmp_path, model, epochs=2, val_check_interval=2)
    assert recorder.training_masks == [0, 1, 2, 0, 1, 2, 0, 1]
    assert set(recorder.validation_masks) == {0}
    model.network.use_mask(2)
    used = []
    model.log_likelihood = lambda batch, noise, labels: used.append(model.network.mask_index) or torch.zeros(len(batch))
    trainer(tmp_path).test(model, loader(), verbose=False)
    assert set(used) == {0}


def test_sampling_while_weights_are_averaged_uses_the_first_mask(tmp_path):
    class SampleAfterValidation(pl.Callback):
        images: list[torch.Tensor]

        def on_train_epoch_end(self, trainer, pl_module):
            self.images = [sample(pl_module, 3, seed=1)[0]]
            pl_module.network.use_mask(0)
            self.images.append(sample(pl_module, 3, seed=1)[0])

    sampling = SampleAfterValidation()
    averaging = EMAWeightAveraging(decay=0.5, use_buffers=False)
    fit(tmp_path, made_module(order="random", num_masks=3), epochs=2, callbacks=[sampling, averaging])
    assert torch.equal(*sampling.images)


# -- checkpoints ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_reloads_without_running_code_from_it(tmp_path):
    config = {"model": {"name": "made", "hidden_sizes": [24, 24], "logit_lambda": None}, "seed": 1}
    model = made_module(config=config, order="random", degrees="random", num_masks=2)
    best = ModelCheckpoint(dirpath=tmp_path, monitor="val/bits_per_dim", filename="best", save_last=True)
    fit(tmp_path, model, epochs=2, callbacks=[best])
    for name in ("best", "last"):
        checkpoint = torch.load(tmp_path / f"{name}.ckpt", weights_only=True)
        assert checkpoint["hyper_parameters"] == {"config": config, "sample_shape": [1, 3, 4]}
    fresh = made_module(order="random", degrees="random", num_masks=2, mask_seed=77)
    fresh.load_state_dict(checkpoint["state_dict"])
    model.network.use_mask(0)
    batch, noise = images(4), torch.rand(4, *SHAPE)
    assert torch.equal(fresh.log_likelihood(batch, noise), model.log_likelihood(batch, noise))
    data = loader()
    expected, actual = (trainer(tmp_path).validate(m, data, verbose=False) for m in (model, fresh))
    assert actual == expected


def test_training_goes_on_from_a_checkpoint_with_its_masks(tmp_path):
    model = made_module(num_masks=3)
    fit(tmp_path, model, epochs=1)
    resumed = made_module(num_masks=3, mask_seed=9)
    recorder = fit(tmp_path, resumed, epochs=2, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(resumed.network.degrees, model.network.degrees)
    assert recorder.training_masks == [1, 2, 0, 1]  # steps 4 to 7


# -- options -------------------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_linearly_and_falls_along_a_cosine(tmp_path):
    options = OptimizerOptions(lr=0.02, warmup_fraction=0.25, final_lr_fraction=0.1)
    rates = fit(tmp_path, made_module(options), epochs=4).rates  # 16 steps
    assert len(rates) == 16
    assert rates[:4] == pytest.approx([0.005, 0.01, 0.015, 0.02])
    assert rates[4] == pytest.approx(0.02)
    assert rates[10] == pytest.approx((0.02 + 0.002) / 2)  # half way down
    assert rates[15] == pytest.approx(0.002 + 0.018 * 0.5 * (1 + math.cos(math.pi * 11 / 12)))
    assert rates[4:] == sorted(rates[4:], reverse=True)


@pytest.mark.parametrize(
    ("options", "first", "last"),
    [
        (OptimizerOptions(lr=0.02, warmup_fraction=0.0, final_lr_fraction=1.0), 0.02, 0.02),
        (OptimizerOptions(lr=0.02, warmup_fraction=1.0), 0.02 / 16, 0.02),
    ],
)
def test_the_learning_rate_without_decay_or_with_nothing_but_warm_up(tmp_path, options, first, last):
    rates = fit(tmp_path, made_module(options), epochs=4).rates
    assert (rates[0], rates[-1]) == pytest.approx((first, last))


def test_training_without_end_keeps_the_highest_rate_after_its_warm_up(tmp_path):
    class StopAfterEight(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 8

    options = OptimizerOptions(lr=0.02, warmup_fraction=0.001)
    rates = fit(tmp_path, made_module(options), epochs=-1, callbacks=[StopAfterEight()]).rates
    assert rates[:5] == pytest.approx([0.004, 0.008, 0.012, 0.016, 0.02])
    assert rates[5:] == pytest.approx([0.02] * 3)


def test_optimiser_options_reach_the_optimiser(tmp_path):
    model = made_module(OptimizerOptions(weight_decay=0.3, beta1=0.5, beta2=0.6))
    optimizer = fit(tmp_path, model, epochs=1).optimizer
    assert optimizer.defaults["betas"] == (0.5, 0.6)
    assert optimizer.defaults["weight_decay"] == 0.3
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters())) == 6


@pytest.mark.parametrize(
    ("shape", "squeeze", "expected"), [((1, 2, 2), None, 1e-6), ((3, 2, 2), None, 0.05), ((3, 2, 2), 0.01, 0.01)]
)
def test_the_papers_squeeze_is_the_default(shape, squeeze, expected):
    model = MadeModule(MadeOptions(hidden_sizes=[4], logit_lambda=squeeze), shape)
    assert model.transform.squeeze == expected
    assert model.length == math.prod(shape)
