"""What models share that answer a question about a sample and are told the right answer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric

from lit_parallel.modules.base import TrainableModule
from lit_parallel.modules.options import OptimizerOptions


class SupervisedModule(TrainableModule):
    """Base of the models that learn from pairs of a sample and its target.

    Args:
        sample_shape: Shape of one sample of the data.
        metrics: What is logged; the first is the loss.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers, kept in the checkpoint.
    """

    def __init__(
        self,
        sample_shape: Sequence[int],
        metrics: Sequence[str],
        optimizer: OptimizerOptions | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(sample_shape, optimizer or OptimizerOptions(), config)
        self.metrics = tuple(metrics)
        self.validation_means = nn.ModuleDict({name: MeanMetric() for name in metrics})
        self.test_means = nn.ModuleDict({name: MeanMetric() for name in metrics})

    @abstractmethod
    def measure(self, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Each of :attr:`metrics` that can be told, of every sample, ``[batch]``; ``loss`` is what training lowers.

        Args:
            answers: ``[batch, ..., outputs]``, float32 or float64.
            targets: ``[batch, ...]``.
        """

    def training_step(self, batch: Any, batch_index: int) -> Tensor:
        means = {name: values.mean() for name, values in self.measure(self(batch[0]), batch[1]).items()}
        self.log_dict({f"train/{name}": mean.detach() for name, mean in means.items()}, prog_bar=True, sync_dist=True)
        return means["loss"]

    def on_validation_epoch_start(self) -> None:
        _reset(self.validation_means)

    def on_test_epoch_start(self) -> None:
        _reset(self.test_means)

    def validation_step(self, batch: Any, batch_index: int) -> None:
        self._evaluate(batch, self.validation_means, "val")

    def test_step(self, batch: Any, batch_index: int) -> None:
        self._evaluate(batch, self.test_means, "test")

    def _evaluate(self, batch: Any, means: nn.ModuleDict, part: str) -> None:
        for name, values in self.measure(self(batch[0]), batch[1]).items():
            mean: Any = means[name]
            mean.update(values)
            self.log(f"{part}/{name}", mean, prog_bar=True, batch_size=len(values))


def _reset(means: nn.ModuleDict) -> None:
    """Begin anew: a MeanMetric adds in place, and cannot to what inference mode has made (validate, then fit)."""
    for mean in means.values():
        mean.reset()  # type: ignore[operator]
