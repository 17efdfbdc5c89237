"""Recurrent networks as LightningModules: predicting pixels or characters, and answering at the end of a sequence."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.conditionals import Categorical
from lit_parallel.errors import UserError
from lit_parallel.modules.conditional import ConditionalModule
from lit_parallel.modules.options import OptimizerOptions, RnnOptions
from lit_parallel.modules.supervised import SupervisedModule
from lit_parallel.networks.rnn import LastState, NextCharacter, NextLevel, Recurrence, build_recurrence
from lit_parallel.sampling.positions import Positions


class NextPixelModule(ConditionalModule):
    """Predicts every 8-bit pixel from those before it by a categorical distribution (Song et al., 2021, section 4.1).

    The loss is the mean cross-entropy per pixel, in nats. It is an autoregressive model of images like the others, and
    can be sampled like them. Of a colour image, the channels of a pixel follow one another.

    Args:
        options: Architecture.
        sample_shape: Channels, height, width.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers, kept in the checkpoint.
    """

    network: NextLevel

    def __init__(
        self,
        options: RnnOptions,
        sample_shape: Sequence[int],
        optimizer: OptimizerOptions | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        channels, height, width = _image_shape(options, sample_shape)
        _check_direction(options)
        conditional = Categorical()
        network = NextLevel(_recurrence(options, 1), conditional.levels)
        super().__init__(network, conditional, (channels, height, width), optimizer, config)
        self.options = options


class SequenceModule(SupervisedModule):
    """Base of the models that read a sequence and answer from the last hidden state.

    Args:
        options: Architecture.
        sample_shape: Shape of one sample of the data.
        input_size: Features of the input at a time step.
        outputs: Numbers in an answer.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers, kept in the checkpoint.
    """

    network: LastState

    def __init__(
        self,
        options: RnnOptions,
        sample_shape: Sequence[int],
        input_size: int,
        outputs: int,
        optimizer: OptimizerOptions | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(sample_shape, self.metrics, optimizer, config)
        self.options = options
        self.network = LastState(_recurrence(options, input_size), outputs)

    @abstractmethod
    def sequences(self, samples: Tensor) -> Tensor:
        """What the network reads, ``[batch, time, input]``, from the first part of a batch."""

    def forward(self, samples: Tensor) -> Tensor:
        """Answers ``[batch, outputs]`` to the first part of a batch; never in half precision."""
        answers = self.network_in_use(self.sequences(samples))
        return answers.to(torch.promote_types(answers.dtype, torch.float32))


class ClassificationModule(SequenceModule):
    """Tells the class of an image that it reads pixel by pixel, rows from the top, all channels of a pixel at once.

    Args:
        options: Architecture.
        sample_shape: Channels, height, width.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers, kept in the checkpoint.
    """

    metrics = ("loss", "accuracy")

    def __init__(
        self,
        options: RnnOptions,
        sample_shape: Sequence[int],
        optimizer: OptimizerOptions | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        channels, height, width = _image_shape(options, sample_shape)
        num_classes = 10 if options.num_classes is None else options.num_classes
        super().__init__(options, sample_shape, channels, num_classes, optimizer, config)
        self.positions = Positions((channels, height, width), channels)
        self.num_classes = num_classes

    def sequences(self, samples: Tensor) -> Tensor:
        """Pixels in [0, 1], ``[batch, time, channels]``, from images ``[batch, channels, height, width]``, uint8."""
        return self.positions.from_images(samples).to(self.network.output.weight.dtype) / 255

    def measure(self, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {
            "loss": F.cross_entropy(answers, targets, reduction="none"),
            "accuracy": (answers.argmax(dim=1) == targets).to(answers.dtype),
        }


class RegressionModule(SequenceModule):
    """Tells a number about a sequence of numbers; the loss is the squared error.

    Where the data say how large the error of always answering the mean is (``target_variance``), ``relative_error`` is
    the error relative to it.

    Args:
        options: Architecture.
        sample_shape: Time, features.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers, kept in the checkpoint.
    """

    metrics = ("loss", "relative_error")
    target_variance: float | None = None

    def __init__(
        self,
        options: RnnOptions,
        sample_shape: Sequence[int],
        optimizer: OptimizerOptions | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        if len(sample_shape) != 2:
            raise UserError(
                "model.task=regression needs sequences of numbers, and the data are images: set data.name=adding, or "
                "model.task=classification."
            )
        super().__init__(options, sample_shape, sample_shape[1], 1, optimizer, config)

    def check_data(self, data: Any) -> None:
        super().check_data(data)
        _check_task(self.options, data)
        self.target_variance = getattr(data, "target_variance", None)

    def sequences(self, samples: Tensor) -> Tensor:
        """The numbers, ``[batch, time, features]``."""
        return samples

    def measure(self, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
        errors = (answers[:, 0] - targets).square()
        if self.target_variance is None:
            return {"loss": errors}
        return {"loss": errors, "relative_error": errors.detach() / self.target_variance}


class NextCharacterModule(SupervisedModule):
    """Predicts every character of a text from those before it; the loss is the mean cross-entropy, in nats.

    It starts anew, from a state of zeros, with every piece of the text.

    Args:
        options: Architecture.
        sample_shape: Time, and how many characters there are.
        optimizer: Optimiser and schedule.
        config: The resolved config as plain containers, kept in the checkpoint.
    """

    metrics = ("loss", "bits_per_character")
    network: NextCharacter

    def __init__(
        self,
        options: RnnOptions,
        sample_shape: Sequence[int],
        optimizer: OptimizerOptions | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        if len(sample_shape) != 2:
            raise UserError(
                "model.task=next_character needs a text, and the data are images: set data.name=characters, or "
                "model.task=next_pixel."
            )
        _check_direction(options)
        super().__init__(sample_shape, self.metrics, optimizer, config)
        self.options = options
        self.network = NextCharacter(_recurrence(options, sample_shape[1]), sample_shape[1])

    def check_data(self, data: Any) -> None:
        super().check_data(data)
        _check_task(self.options, data)

    def forward(self, characters: Tensor) -> Tensor:
        """Logits of what follows each character, ``[batch, time, characters]``, of ``[batch, time]`` integers."""
        answers = self.network_in_use(characters)
        return answers.to(torch.promote_types(answers.dtype, torch.float32))

    def measure(self, answers: Tensor, targets: Tensor) -> dict[str, Tensor]:
        nats = F.cross_entropy(answers.transpose(1, 2), targets.long(), reduction="none").mean(dim=1)
        return {"loss": nats, "bits_per_character": nats.detach() / math.log(2)}


_TASKS: dict[str, Any] = {
    "next_pixel": NextPixelModule,
    "classification": ClassificationModule,
    "regression": RegressionModule,
    "next_character": NextCharacterModule,
}


def build_sequence_module(
    options: RnnOptions, sample_shape: Sequence[int], optimizer: OptimizerOptions, config: dict[str, Any] | None = None
) -> NextPixelModule | SequenceModule | NextCharacterModule:
    """The module for ``model.task``.

    Raises:
        UserError: If the task does not fit the data, or there is no such network.
    """
    if options.num_classes is not None and options.task != "classification":
        raise UserError("model.num_classes belongs to model.task=classification: leave it out.")
    return _TASKS[options.task](options, sample_shape, optimizer, config)


def _recurrence(options: RnnOptions, input_size: int) -> nn.RNNBase | Recurrence:
    return build_recurrence(
        options.cell,
        input_size,
        options.hidden_size,
        layers=options.layers,
        dropout=options.dropout,
        bidirectional=options.bidirectional,
        forget_bias=options.forget_bias,
    )


def _check_direction(options: RnnOptions) -> None:
    if options.bidirectional:
        raise UserError("model.bidirectional would show the network what it is to predict: set it to false.")


def _check_task(options: RnnOptions, data: Any) -> None:
    """Sequences of numbers and of characters have shapes of one form: the data say which they are."""
    task = getattr(data, "task", options.task)
    if task != options.task:
        raise UserError(f"data.name={data.name} is not for model.task={options.task}: set model.task={task}.")


def _image_shape(options: RnnOptions, sample_shape: Sequence[int]) -> Sequence[int]:
    if len(sample_shape) != 3:
        raise UserError(
            f"model.task={options.task} needs images, and the data are sequences: set data.name=mnist5k, or "
            "model.task=regression (of numbers) or next_character (of a text)."
        )
    return sample_shape
