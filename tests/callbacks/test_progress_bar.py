import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch.utils.data import DataLoader

from callbacks.progress_bar import ProgressBar


class Line(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch, _):
        self.log("train/relative_error", torch.tensor(2.441), prog_bar=True)
        return self.weight * batch.mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:The number of training batches")
def test_metrics_are_whole_in_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=CSVLogger(tmp_path, version="a_version"),
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[ProgressBar()],
    )
    trainer.fit(Line(), DataLoader(torch.ones(6, 1), batch_size=2))
    printed = capsys.readouterr().out
    last = printed[printed.rindex("Epoch 0/0") :]
    assert "3/3" in last
    assert "it/s" in last
    assert "train/relative_error:" in last
    assert "2.441" in last
    assert "v_num" not in printed
    assert max(map(len, last.splitlines())) <= 80
