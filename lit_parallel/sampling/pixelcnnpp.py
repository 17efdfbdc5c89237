"""Sampling a PixelCNN++ from what its layers remember: the one network, evaluated where something may have changed.

A window of rows (a multiple of 4, the product of the strides) reads one remembered row above itself in every layer
and writes its own. One pixel, of ordinary sequential sampling, runs only those layers that are due: those of level l,
whose pixels are ``2 ** l`` image pixels wide, at every ``2 ** l``-th row and column, and those of the down stream once
per row, for all of it, since they depend on the rows above only.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lit_parallel.networks.causal import CausalConv2d, Surround
from lit_parallel.networks.pixelcnnpp import RESOLUTIONS, STRIDE, PixelCNNpp, Resample, ResnetPair, Streams, joined
from lit_parallel.sampling.autoregressive import AutoregressiveSystem, arithmetic, select_of
from lit_parallel.sampling.incremental import Memory, Rectangle
from lit_parallel.solvers import Sequential
from lit_parallel.systems import Equations, Evaluation, TriangularSystem, write


@dataclass
class Memories:
    """What is remembered of a batch of images.

    Attributes:
        inputs: Of layers that read beside a pixel: what they read.
        outputs: Of layers that are not due at every pixel: what they put out. ``None``: nobody will ask.
    """

    inputs: dict[nn.Module, Memory] = field(default_factory=dict)
    outputs: dict[nn.Module, Memory] | None = field(default_factory=dict)


class Part:
    """Evaluates the network on a part of the image; a visitor of :meth:`PixelCNNpp.walk`.

    Args:
        memories: Read where the part ends, and written.
        here: The part, at each level: where the down-right stream is evaluated; ``None`` where it is not due.
        rows: The same for the down stream.
        labels: ``[batch]``, or ``None``.
    """

    def __init__(
        self,
        memories: Memories,
        here: list[Rectangle | None],
        rows: list[Rectangle | None],
        labels: Tensor | None,
    ) -> None:
        self.memories, self.here, self.rows, self.labels = memories, here, rows, labels

    @classmethod
    def window(cls, memories: Memories, rectangle: Rectangle, labels: Tensor | None) -> Part:
        """Whole rows: the first a multiple of 4, and as many."""
        levels = _levels(rectangle, RESOLUTIONS)
        return cls(memories, levels, levels, labels)

    @classmethod
    def pixel(cls, memories: Memories, row: int, column: int, image: tuple[int, int], labels: Tensor | None) -> Part:
        """One pixel; at the beginning of a row, with the down stream of that row."""
        due = levels_due(row, column)
        here = _levels(Rectangle(row, 1, column, 1, image), due)
        rows = _levels(Rectangle(row, 1, 0, image[1], image), due if column == 0 else 0)
        return cls(memories, here, rows, labels)

    def resnets(self, level: int, pair: ResnetPair, streams: Streams, skips: Streams) -> Streams:
        rows, here = self.rows[level], self.here[level]
        down, down_right = streams
        skip_down, skip_down_right = skips
        if rows is not None:
            down = pair.down(down, skip_down, self.labels, self._surround(rows))
            self._keep(pair.down, down, rows)
        if here is None:
            return None, None
        beside = joined(self._recall(pair.down, down, here), skip_down_right)
        return down, pair.down_right(down_right, beside, self.labels, self._surround(here))

    def downsample(self, level: int, layer: Resample, streams: Streams) -> Streams:
        down, down_right = streams
        down = self._downsampled(layer.down, down, self.rows, level)
        return down, self._downsampled(layer.down_right, down_right, self.here, level)

    def upsample(self, level: int, layer: Resample, streams: Streams) -> Streams:
        down, down_right = streams
        down = self._upsampled(layer.down, down, self.rows, level)
        return down, self._upsampled(layer.down_right, down_right, self.here, level)

    def _downsampled(
        self, layer: nn.Module, x: Tensor | None, levels: list[Rectangle | None], level: int
    ) -> Tensor | None:
        rectangle = levels[level]
        if rectangle is None or x is None:
            return None
        surround = self._surround(rectangle)
        if levels[level + 1] is None:  # not due; when it is, it will read this row and this column too
            assert isinstance(layer, CausalConv2d)
            surround(layer, x)
            return None
        return layer(x, surround)

    def _upsampled(
        self, layer: nn.Module, x: Tensor | None, levels: list[Rectangle | None], level: int
    ) -> Tensor | None:
        coarse, fine = levels[level], levels[level - 1]
        if coarse is not None:
            x = layer(x)  # needs nothing of its surroundings: a pixel becomes four
            self._keep(layer, x, coarse.doubled)
        return None if fine is None else self._recall(layer, x, fine)

    def _surround(self, rectangle: Rectangle) -> Surround:
        """Remember a layer's input, and put around it what is remembered from before."""

        def surround(layer: CausalConv2d, x: Tensor) -> Tensor:
            left, right, above, _ = layer.margins
            if above == 0:  # a layer that reads one pixel
                return x
            memory = self.memories.inputs.get(layer)
            if memory is None:
                memory = self.memories.inputs[layer] = Memory(x, rectangle.image, left, right)
            memory.write(x, rectangle)
            return memory.read(rectangle)

        return surround

    def _keep(self, layer: nn.Module, x: Tensor, rectangle: Rectangle) -> None:
        """Remember a layer's output, for pixels at which it is not due."""
        if self.memories.outputs is None:
            return
        if layer not in self.memories.outputs:
            self.memories.outputs[layer] = Memory(x, rectangle.image)
        self.memories.outputs[layer].write(x, rectangle)

    def _recall(self, layer: nn.Module, x: Tensor | None, rectangle: Rectangle) -> Tensor:
        """A layer's output in a part: what it just put out, or what is remembered of it."""
        if self.here is self.rows:  # a window is evaluated by every layer
            assert x is not None
            return x
        assert self.memories.outputs is not None
        return self.memories.outputs[layer].read(rectangle)[:, :, 1:]


def levels_due(row: int, column: int) -> int:
    """How many levels, from 0 on, have a pixel that begins at this one of the image."""
    return next((level for level in range(RESOLUTIONS) if (row | column) >> level & 1), RESOLUTIONS - 1) + 1


def _levels(rectangle: Rectangle, due: int) -> list[Rectangle | None]:
    """A part at each level, as far as it is due."""
    levels: list[Rectangle | None] = []
    for level in range(RESOLUTIONS):
        levels.append(rectangle if level < due else None)
        if level + 1 < due:
            rectangle = rectangle.halved
    return levels


class IncrementalPixelCNNppSystem(TriangularSystem):
    """The equations of a PixelCNN++ evaluated from what its layers remember.

    How much is evaluated depends on what is asked for:

    - one equation, an ``int``: the layers that are due at this pixel. Step by step this is cached sequential sampling.
    - per sample ``[batch, width]``: each sample's own window of rows, the one that holds its frontier; as many rows as
      ``width`` equations take, rounded up to a multiple of 4. Samples that are finished are left out.
    - anything else: the whole image.

    All equations before the frontier must have been evaluated from this iterate, as the solver loop sees to.

    Args:
        plain: The same equations by full passes of the network, with the noise, labels and given pixels of both.
    """

    @dataclass
    class State:
        """``x`` ``[batch, length, channels]``, and what is remembered of it: of ``samples`` ``[n]``, or of all."""

        x: Tensor
        memories: Memories
        samples: Tensor | None = field(default=None, kw_only=True)

    def __init__(self, plain: AutoregressiveSystem) -> None:
        assert isinstance(plain.network, PixelCNNpp)
        self.plain, self.network = plain, plain.network
        self.batch_size, self.length, self.device = plain.batch_size, plain.length, plain.device
        _, height, width = plain.positions.image_shape
        self.image = (height, width)
        self._sweeps = True

    @property
    def window(self) -> int:
        return min(self.length, STRIDE * self.image[1])  # measured on a CPU, which pays for every row

    @property
    def windows(self) -> list[int]:
        return [rows * self.image[1] for rows in range(STRIDE, 4 * STRIDE + 1, STRIDE) if rows <= self.image[0]]

    @property
    def block_size(self) -> int:
        return self.plain.block_size

    @property
    def tolerance(self) -> float:
        return self.plain.tolerance

    def reference(self) -> AutoregressiveSystem:
        return self.plain

    def prepare(self, solver: object, limit: int, *, exact: bool, record_residual: bool) -> bool:
        # Only a sweep pixel by pixel leaves out layers, and asks what they put out before.
        self._sweeps = isinstance(solver, Sequential)
        return False

    def new_state(self) -> State:
        memories = Memories() if self._sweeps else Memories(outputs=None)
        state = self.State(self.plain.guess.clone(), memories)
        self._whole(state)
        return state

    def reset(self, state: State, value: Tensor | None = None) -> None:
        self.plain.reset(state.x, value)
        if state.samples is not None:
            state.samples = None
            state.memories.inputs.clear()
        if value is not None:  # from the initial guess, every row is evaluated before it is read
            self._whole(state)

    def value(self, state: State) -> Tensor:
        return state.x.clone()

    def evaluate(self, state: State, equations: Equations, frontier: Tensor, running: Tensor | None) -> Evaluation:
        if running is not None and isinstance(equations, Tensor) and equations.dim() == 2:
            self._leave_out_finished(state, running, self._rows(equations.shape[1]))
        equations, parameters = self.parameters(state, equations, frontier)
        samples = state.samples
        new = self.plain.draw(parameters, equations, samples)
        guess = select_of(self.plain.guess, equations, samples)
        if samples is None:
            return write(state.x, equations, new, guess, running)
        assert running is not None
        x = state.x[samples]
        of_samples = write(x, equations, new, guess, running[samples])
        state.x[samples] = x
        return _of_batch(of_samples, samples, self.batch_size)

    def _leave_out_finished(self, state: State, running: Tensor, rows: int) -> None:
        """Forget samples that are finished, once they are an eighth of those whose windows are evaluated.

        On a CPU, whose time they would take. A CUDA graph has one shape.
        """
        if self.device.type != "cpu" or rows == self.image[0]:
            return
        samples = torch.arange(self.batch_size) if state.samples is None else state.samples
        in_work = running[samples].nonzero().squeeze(1)
        if 0 < len(in_work) <= len(samples) * 7 / 8:
            state.samples = samples[in_work]
            for memory in state.memories.inputs.values():
                memory.keep(in_work)

    def parameters(self, state: State, equations: Equations, frontier: Tensor) -> tuple[Equations, Tensor]:
        """What is really evaluated, and the conditionals' parameters there, ``[batch, width, num_parameters]``."""
        height, width = self.image
        labels = self.plain.labels
        if isinstance(equations, int):
            part = Part.pixel(state.memories, *divmod(equations, width), self.image, labels)
            return equations, self._evaluate(state.x, part)
        if equations is not None and equations.dim() == 1:
            return equations, self._whole(state).index_select(1, equations)
        rows = height if equations is None else self._rows(equations.shape[1])
        if rows == height:
            return None, self._whole(state)
        x, samples = state.x, state.samples
        if samples is not None:
            x, frontier, labels = x[samples], frontier[samples], None if labels is None else labels[samples]
        top = (frontier // (STRIDE * width) * STRIDE).clamp(max=height - rows)
        window = Part.window(state.memories, Rectangle(top, rows, 0, width, self.image), labels)
        return top[:, None] * width + torch.arange(rows * width, device=self.device), self._evaluate(x, window)

    def _rows(self, width: int) -> int:
        """Rows of a window for so many equations."""
        per_block = STRIDE * self.image[1]
        return min(self.image[0], -(-width // per_block) * STRIDE)

    def _whole(self, state: State) -> Tensor:
        """Evaluate the whole image: then everything that is remembered belongs to this iterate."""
        height, width = self.image
        whole = Rectangle(0, height, 0, width, self.image)
        return self._evaluate(state.x, Part.window(state.memories, whole, self.plain.labels))

    def _evaluate(self, x: Tensor, part: Part) -> Tensor:
        """The conditionals' parameters in a part, ``[batch, width, num_parameters]``, from an iterate."""
        with arithmetic(self.plain.options.precision):
            parameters = self.network.head(self.network.walk(self._first_features(x, part), part), _as_it_is)
        return parameters.flatten(2).transpose(1, 2).to(self.plain.dtype)

    def _first_features(self, x: Tensor, part: Part) -> Streams:
        """The streams' first features: nothing that is remembered, since the last pixel drawn is newer than that.

        To shift a convolution's result is to convolve a shifted input, but for the zeros that are shifted in.
        """
        rows, here = part.rows[0], part.here[0]
        assert here is not None
        around = self._image_around(x, here)
        above = self.network.row_above(around[:, :, 1:-1], _as_it_is)
        left = self.network.left(around[:, :, 1:, :-2], _as_it_is)
        if here.left == 0:
            left = F.pad(left[:, :, :, 1:], (1, 0))
        down_right = _without_first_row(above, here) + left
        if rows is None:
            return None, down_right
        if rows is not here:
            around = self._image_around(x, rows)
        return _without_first_row(self.network.rows_above(around[:, :, :-1], _as_it_is), rows), down_right

    def _image_around(self, x: Tensor, rectangle: Rectangle) -> Tensor:
        """The network's input in a part, two rows above it and a column on either side, with its channel of ones.

        ``[batch, channels + 1, 2 + rows, 1 + columns + 1]``, zeros outside of the image.
        """
        (height, width), top = rectangle.image, rectangle.top
        first = max(rectangle.left - 1, 0)
        end = min(rectangle.left + rectangle.columns + 1, width)
        margins = [first - (rectangle.left - 1), rectangle.left + rectangle.columns + 1 - end, 0, 0]
        grid, inside = x.unflatten(1, (height, width)), None
        if isinstance(top, Tensor):
            row = top[:, None] + torch.arange(-2, rectangle.rows, device=self.device)
            inside = row >= 0
            of_sample = torch.arange(len(x), device=self.device)[:, None] * height
            seen = grid.flatten(0, 1).index_select(0, (of_sample + row.clamp(min=0)).flatten())
            seen = seen.unflatten(0, row.shape)[:, :, first:end]
        else:
            seen = grid[:, max(top - 2, 0) : top + rectangle.rows, first:end]
            margins[2] = max(2 - top, 0)
        seen = torch.where(seen.isfinite(), seen, 0)
        encoded = self.plain.conditional.encode(seen.flatten(1, 2)).to(self.plain.network_dtype)
        encoded = encoded.unflatten(1, seen.shape[1:3]).permute(0, 3, 1, 2)
        image = torch.cat([encoded, torch.ones_like(encoded[:, :1])], dim=1)
        if inside is not None:
            image = torch.where(inside[:, None, :, None], image, 0)
        return F.pad(image, margins)


def _of_batch(evaluation: Evaluation, samples: Tensor, batch_size: int) -> Evaluation:
    """What an iteration did to some samples, as part of the batch: to the others nothing."""

    def spread(part: Tensor) -> Tensor:
        return part.new_zeros(batch_size, *part.shape[1:]).index_copy_(0, samples, part)

    assert isinstance(evaluation.equations, Tensor)
    assert evaluation.value is not None
    return Evaluation(spread(evaluation.equations), spread(evaluation.change), spread(evaluation.value))


def _as_it_is(layer: CausalConv2d, x: Tensor) -> Tensor:
    return x


def _without_first_row(x: Tensor, rectangle: Rectangle) -> Tensor:
    """Zeros in the first row of the image, if the part has it."""
    if isinstance(rectangle.top, Tensor):
        row = rectangle.top[:, None] + torch.arange(rectangle.rows, device=x.device)
        return torch.where((row > 0)[:, None, :, None], x, 0)
    return x if rectangle.top else F.pad(x[:, :, 1:], (0, 0, 1, 0))
