"""Sampling any autoregressive network as a triangular system: one equation per position.

With fixed noise, ``x_t = g(parameters_t(x_<t), noise_t)``, where g is the coupling of the conditional distribution.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lit_parallel.conditionals import Conditional
from lit_parallel.errors import UserError
from lit_parallel.networks.causal import as_products
from lit_parallel.sampling.noise import generator
from lit_parallel.sampling.options import SamplingOptions
from lit_parallel.sampling.positions import Positions
from lit_parallel.systems import Equations, Evaluation, TensorSystem, select, write


@dataclass(frozen=True)
class Given:
    """Pixels that are known from the start: their equations are solved.

    Sample i gets image ``i % len(images)``.

    Attributes:
        images: uint8 ``[n, channels, height, width]``.
        mask: bool ``[height, width]`` or ``[n, height, width]``, true where a pixel is given.
    """

    images: Tensor
    mask: Tensor

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raise a `UserError` unless images and mask fit a model's images."""
        if self.images.dtype != torch.uint8 or tuple(self.images.shape[1:]) != tuple(image_shape):
            raise UserError(
                f"given images must be uint8 of shape [n, {', '.join(map(str, image_shape))}], not "
                f"{str(self.images.dtype).removeprefix('torch.')} of shape {list(self.images.shape)}."
            )
        if len(self.images) == 0:
            raise UserError("there is no given image: the images are empty.")
        shapes = (tuple(image_shape[1:]), (len(self.images), *image_shape[1:]))
        if self.mask.dtype != torch.bool or tuple(self.mask.shape) not in shapes:
            raise UserError(
                f"the mask of given pixels must be bool of shape {list(shapes[0])} or {list(shapes[1])}, not "
                f"{str(self.mask.dtype).removeprefix('torch.')} of shape {list(self.mask.shape)}."
            )


class AutoregressiveSystem(TensorSystem):
    """Every evaluation is one forward pass over all positions; samples are drawn for the equations asked for.

    The iterate is ``[batch, length, channels]``. Noise, labels and given pixels are buffers that :meth:`load` fills.

    Args:
        network: Folded, in evaluation mode: see :func:`folded`.
        conditional: The distribution of a position's values.
        positions: Which equation is which pixel.
        batch_size: Samples.
        options: Coupling, temperature, label, arithmetic.
        num_classes: Number of labels that the network takes, or ``None``.
        given: Pixels that are known.
    """

    # One evaluation costs the same for one equation as for all: a graph of T of them would only be large.
    unroll = False

    def __init__(
        self,
        network: nn.Module,
        conditional: Conditional,
        positions: Positions,
        batch_size: int,
        options: SamplingOptions,
        *,
        num_classes: int | None = None,
        given: Given | None = None,
    ) -> None:
        parameter = next(network.parameters(), torch.zeros(1))
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        shape = (batch_size, positions.length, conditional.channels)
        super().__init__(torch.zeros(shape, dtype=self.dtype, device=parameter.device))
        self.coupling = conditional.check_coupling(options.coupling)
        self.conditional, self.positions, self.options, self.given = conditional, positions, options, given
        self.network = network.to(torch.bfloat16) if options.precision == "bf16" else network
        if self.device.type != "cpu":  # where convolutions may go through transforms, whose rounding is not causal
            as_products(self.network)
        self.network_dtype = next((parameter.dtype for parameter in self.network.parameters()), self.dtype)
        width = conditional.draw_noise(generator(0, 0), 1, self.coupling).shape[1]
        self.noise = self.guess.new_ones(batch_size, positions.length, width)
        self.num_classes = num_classes
        self.labels = None if num_classes is None else torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        self.is_given = None
        if given is not None:
            given.check(positions.image_shape)
            self.is_given = torch.zeros(shape, dtype=torch.bool, device=self.device)
        if options.label is not None and (num_classes is None or options.label >= num_classes):
            known = "the model is not class-conditional" if num_classes is None else f"it knows 0 to {num_classes - 1}"
            raise UserError(f"there is no class {options.label} to draw (sampling.label): {known}.")

    @property
    def window(self) -> int:
        return min(self.length, 8 * self.positions.row)

    @property
    def block_size(self) -> int:
        return self.positions.row

    @property
    def tolerance(self) -> float:
        return self.conditional.tolerance(self.coupling)

    def load(self, seed: int, indices: list[int]) -> None:
        """Fill noise, labels and given pixels for the samples with these indices; each depends on nothing else."""

        def draw(index: int) -> Tensor:
            return torch.from_numpy(self.conditional.draw_noise(generator(seed, index), self.length, self.coupling))

        with ThreadPoolExecutor() as threads:  # NumPy draws without holding the interpreter's lock
            for noise, drawn in zip(self.noise, threads.map(draw, indices), strict=True):
                noise.copy_(drawn)
        if self.labels is not None and self.num_classes is not None:
            label = self.options.label
            labels = [index % self.num_classes if label is None else label for index in indices]
            self.labels.copy_(torch.tensor(labels))
        if self.given is not None and self.is_given is not None:
            which = torch.tensor(indices) % len(self.given.images)
            mask = self.given.mask.expand(self.given.images.shape[0], *self.given.mask.shape[-2:])[which]
            images = self.given.images[which]
            self.is_given.copy_(self.positions.from_images(mask[:, None].expand(images.shape)))
            values = self.positions.from_images(self.conditional.from_pixels(images))
            self.guess.copy_(torch.where(self.is_given, values.to(self.guess), 0))

    def images(self, value: Tensor) -> Tensor:
        """A solution as 8-bit images ``[batch, channels, height, width]``."""
        return self.positions.to_images(self.conditional.to_pixels(value))

    def function(self, x: Tensor) -> Tensor:
        return self.draw(self.parameters(x), None)

    def evaluate(self, state: Tensor, equations: Equations, frontier: Tensor, running: Tensor | None) -> Evaluation:
        # A predetermined sweep leaves what is not finite where it is; not every network can read that (an embedding).
        x = state if running is not None else torch.where(state.isfinite(), state, self.guess)
        new = self.draw(select(self.parameters(x), equations), equations)
        return write(state, equations, new, select(self.guess, equations), running)

    def parameters(self, x: Tensor) -> Tensor:
        """The conditionals' parameters at all positions, ``[batch, length, num_parameters]``, from an iterate."""
        encoded = self.conditional.encode(x)
        if encoded.is_floating_point():
            encoded = encoded.to(self.network_dtype)
        with arithmetic(self.options.precision):
            parameters = self.positions.parameters(self.network, encoded, self.labels)
        check_shape(self.network, parameters, [*x.shape[:2], self.conditional.num_parameters])
        return parameters.to(self.dtype)

    def draw(self, parameters: Tensor, equations: Equations, samples: Tensor | None = None) -> Tensor:
        """New values ``[batch, width, channels]`` of the named equations, from their parameters.

        With ``samples`` ``[n]``, places in the batch, all of them are of these only, and equations ``[n, width]``.
        """
        batch, width = parameters.shape[:2]
        new = self.conditional.sample(
            parameters.reshape(batch * width, -1),
            select_of(self.noise, equations, samples).reshape(batch * width, -1),
            self.coupling,
            self.options.temperature,
        ).unflatten(0, (batch, width))
        if self.is_given is not None:
            guess = select_of(self.guess, equations, samples)
            new = torch.where(select_of(self.is_given, equations, samples), guess, new)
        return new


def select_of(x: Tensor, equations: Equations, samples: Tensor | None) -> Tensor:
    """Take the named equations' values: of all samples, or of those in these places of the batch.

    Args:
        x: ``[batch, length, ...]``.
        equations: Which equations; ``[n, width]`` if only some samples are wanted.
        samples: ``[n]``, or ``None``: all.
    """
    if samples is None:
        return select(x, equations)
    assert isinstance(equations, Tensor)
    return x[samples[:, None], equations]


def check_shape(network: nn.Module, parameters: Tensor, wanted: list[int]) -> None:
    """Raise a `UserError` if a network's output is not ``[batch, length, num_parameters]``."""
    if list(parameters.shape) != wanted:
        raise UserError(
            f"{type(network).__name__} returned [samples, positions, parameters] = {list(parameters.shape)} for "
            f"{wanted[0]} samples: it must be {wanted}."
        )


@contextlib.contextmanager
def arithmetic(precision: str) -> Iterator[None]:
    """Fix how matrix products and convolutions are computed: always the same algorithm, TF32 only if asked for.

    cuDNN uses TF32 unless told not to, and may choose another algorithm in another process; a user may have lowered
    the precision of float32 for training.
    """
    cudnn, cuda, mkldnn = torch.backends.cudnn, torch.backends.cuda, torch.backends.mkldnn
    tf32 = precision == "tf32"
    # PyTorch has an older and a newer way to say this. The older refuses to answer where the newer was used; where it
    # answers, it is set too, since otherwise it would refuse afterwards (and torch.compile asks it).
    matmul_before = _unless_refused(torch.get_float32_matmul_precision)
    cudnn_before = _unless_refused(lambda: bool(cudnn.allow_tf32))
    on_gpu: list[Any] = [cuda.matmul, cudnn.conv, cudnn.rnn]  # type: ignore[attr-defined]
    on_gpu = [backend for backend in on_gpu if hasattr(backend, "fp32_precision")]  # torch 2.11: not of rnn
    on_cpu: list[Any] = [mkldnn.matmul, mkldnn.conv]  # type: ignore[attr-defined]
    newer_before = [backend.fp32_precision for backend in on_gpu + on_cpu]
    algorithms_before = cudnn.benchmark, cudnn.deterministic
    try:
        if matmul_before is not None:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
        else:
            on_cpu[0].fp32_precision = "ieee"
        if cudnn_before is not None:
            cudnn.allow_tf32 = tf32
        for backend in on_gpu:
            backend.fp32_precision = "tf32" if tf32 else "ieee"
        on_cpu[1].fp32_precision = "ieee"
        cudnn.benchmark, cudnn.deterministic = False, True
        yield
    finally:
        cudnn.benchmark, cudnn.deterministic = algorithms_before
        if matmul_before is not None:
            torch.set_float32_matmul_precision(matmul_before)
        if cudnn_before is not None:
            cudnn.allow_tf32 = cudnn_before
        for backend, value in zip(on_gpu + on_cpu, newer_before, strict=True):
            backend.fp32_precision = value


def _unless_refused(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:
        return None


@torch.no_grad()
def folded(network: nn.Module) -> nn.Module:
    """A copy for sampling: in evaluation mode, without gradients, parametrised weights computed once and for all."""
    # What a forward hook has computed (the older kind of weight normalisation) cannot be copied with its history.
    computed = [
        tensor
        for module in network.modules()
        for tensor in vars(module).values()
        if isinstance(tensor, Tensor) and not tensor.is_leaf
    ]
    replica = copy.deepcopy(network, {id(tensor): tensor.detach().clone() for tensor in computed})
    replica.eval().requires_grad_(False)
    for module in replica.modules():
        if not parametrize.is_parametrized(module):
            continue
        tensors = {name: getattr(module, name).detach().clone() for name in list(module.parametrizations)}  # type: ignore[arg-type]
        # Not parametrize.remove_parametrizations: it edits the class, which the copy shares with the original.
        module.__class__ = module.__class__.__bases__[0]
        del module.parametrizations
        for name, tensor in tensors.items():
            module.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
    return replica
