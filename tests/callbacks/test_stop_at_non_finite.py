"""A training whose numbers are no longer finite ends there, says where, and leaves what was good."""

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from callbacks import LastCheckpoint, StopAtNonFinite
from callbacks import stop_at_non_finite as module
from lit_parallel.errors import UserError

BATCHES = 4  # of an epoch

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]


class Diverging(pl.LightningModule):
    """Trains one number; at a given step its loss, or its gradient alone, is not finite."""

    def __init__(self, what, value, epoch, batch):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.unused = torch.nn.Parameter(torch.ones(1))
        self.what, self.value, self.place = what, value, (epoch, batch)
        self.validated = []

    def training_step(self, batch, index):
        loss = (self.weight * batch[0]).mean()
        if (self.current_epoch, index) == self.place:
            if self.what == "loss":
                return loss * self.value
            loss.register_hook(lambda gradient: gradient * self.value)
        return loss

    def validation_step(self, batch, index):
        self.validated.append(self.weight.item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model, folder, **options):
    batches = DataLoader(TensorDataset(torch.ones(BATCHES, 1)), batch_size=1)
    last = LastCheckpoint(folder)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        callbacks=[last, StopAtNonFinite(last.path)],
        **options,
    )
    trainer.fit(model, batches, batches)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_it_names_epoch_batch_and_step_and_leaves_the_epoch_before(what, value, tmp_path):
    model = Diverging(what, value, 1, 2)
    with pytest.raises(UserError) as caught:
        fit(model, tmp_path)
    message = str(caught.value)
    assert message.startswith(f"training diverged: the {what} of epoch 1, batch 2 (step 6) is not finite.")
    assert f"'{tmp_path / 'last.ckpt'}' holds the epochs before." in message
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == BATCHES
    assert saved["state_dict"]["weight"].item() == pytest.approx(1 - 0.1 * BATCHES)


@pytest.mark.parametrize("batch", range(BATCHES))
def test_read_now_and_then_it_still_names_the_first_and_comes_before_validation(batch, tmp_path, monkeypatch):
    # As on a GPU, where the host does not wait for every batch.
    monkeypatch.setattr(module, "_READ_EVERY", 3)
    monkeypatch.setattr(StopAtNonFinite, "reading_is_free", lambda *_: False)
    model = Diverging("loss", float("nan"), 1, batch)
    with pytest.raises(UserError, match=rf"the loss of epoch 1, batch {batch} \(step {BATCHES + batch}\)"):
        fit(model, tmp_path)
    assert len(model.validated) == BATCHES
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0


def test_in_the_first_epoch_nothing_is_left(tmp_path):
    with pytest.raises(UserError, match=r"batch 0 \(step 0\) is not finite. Train again"):
        fit(Diverging("loss", float("nan"), 0, 0), tmp_path)
    assert not list(tmp_path.iterdir())


def test_accumulated_gradients_are_told_by_the_batch_that_spoiled_them(tmp_path):
    with pytest.raises(UserError, match=r"the loss of epoch 0, batch 2 \(step 1\)"):
        fit(Diverging("loss", float("nan"), 0, 2), tmp_path, accumulate_grad_batches=2)


def test_what_is_finite_goes_on(tmp_path):
    model = Diverging("gradient", 1e38, 1, 0)  # its square is not
    fit(model, tmp_path)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 2
