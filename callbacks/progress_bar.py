"""How far a run is, in one line."""

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import RichProgressBar
from rich.progress import BarColumn

_BAR_WIDTH = 10


class ProgressBar(RichProgressBar):
    """Lightning's, made to fit 80 columns: a short bar, so that metrics keep their whole names and values.

    The version that Lightning takes from the logger is left out; the run folder is printed before.
    """

    def __init__(self) -> None:
        super().__init__(leave=False)

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        columns = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = _BAR_WIDTH
        return columns

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics
