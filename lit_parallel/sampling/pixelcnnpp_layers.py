"""A PixelCNN++'s own layers, laid out for the kernels of ``kernels/pixelcnnpp.py`` by a walk through the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_parallel.kernels.pixelcnnpp import IMAGE_FEATURES, Job, Kind, Layers, Map, pack, pack_bias, padded
from lit_parallel.networks.causal import CausalConv2d, CausalConvTranspose2d
from lit_parallel.networks.pixelcnnpp import RESOLUTIONS, GatedResnet, PixelCNNpp, Resample, ResnetPair


@dataclass(frozen=True)
class LaidOut:
    """A network for the kernels.

    Attributes:
        layers: All jobs with their weights, in an order in which each stands behind those that it reads.
        elements: Of the arena, for one slot.
        pitch: Numbers in a row of parameters.
    """

    layers: Layers
    elements: int
    pitch: int

    def launches(self, levels: int = RESOLUTIONS, *, down: bool = True) -> list[list[int]]:
        """Which jobs run in which launch: each as soon as what it reads is there, so those of both streams together.

        Args:
            levels: How many levels are due, from 0 on.
            down: Whether the down stream is.
        """
        written: dict[int, int] = {}  # by offset of the map: in which launch
        launches: list[list[int]] = []
        for index, job in enumerate(self.layers.jobs):
            if job.level >= levels or (job.down and not down):
                continue
            reads = [job.source, *job.skips] if job.kind != Kind.IMAGE else []
            when = 1 + max((written.get(read.offset, -1) for read in reads), default=-1)
            if job.target is not None:
                written[job.target.offset] = when
            launches += [[] for _ in range(when + 1 - len(launches))]
            launches[when].append(index)
        return launches


def lay_out(network: PixelCNNpp, image: tuple[int, int]) -> LaidOut:
    """Lay out a folded network.

    Args:
        network: Its weights are copied.
        image: Rows and columns of an image.
    """
    recorder = _Recorder(network, image)
    return LaidOut(Layers(recorder.jobs), recorder.elements, recorder.jobs[-1].weight.shape[-1])


class _Recorder:
    """Notes every layer as a job; a visitor of :meth:`PixelCNNpp.walk` to which a map in the arena is a tensor."""

    def __init__(self, network: PixelCNNpp, image: tuple[int, int]) -> None:
        self.image, self.filters = image, network.filters
        self.elements = 0
        self.jobs: list[Job] = []
        last = network.walk(self._first_features(network), self)  # type: ignore[arg-type]
        weight = network.output.weight[:, :, 0, 0].T
        self._add(
            Kind.OUTPUT,
            last,  # type: ignore[arg-type]
            None,
            [weight],
            network.output.bias[None],
        )

    # -- what the walk asks for ---------------------------------------------------------------------------------

    def resnets(self, level: int, pair: ResnetPair, streams: _Maps, skips: _Maps) -> _Maps:
        down, down_right = streams
        skip_down, skip_down_right = skips
        assert down is not None
        assert down_right is not None
        down = self._resnet(pair.down, down, [skip_down], down_stream=True)
        return down, self._resnet(pair.down_right, down_right, [down, skip_down_right], down_stream=False)

    def downsample(self, level: int, layer: Resample, streams: _Maps) -> _Maps:
        return self._each(self._downsample, layer, streams)

    def upsample(self, level: int, layer: Resample, streams: _Maps) -> _Maps:
        return self._each(self._upsample, layer, streams)

    def _each(self, add: Callable[[Any, Map, bool], Map], layer: Resample, streams: _Maps) -> _Maps:
        down, down_right = streams
        assert down is not None
        assert down_right is not None
        return add(layer.down, down, True), add(layer.down_right, down_right, False)

    # -- layers -------------------------------------------------------------------------------------------------

    def _first_features(self, network: PixelCNNpp) -> _Maps:
        """Both streams' first features as kernels of 2 x 3 places on the image, whose bias hangs on a channel of ones.

        The network shifts the results of these convolutions down or to the right, zeros come in behind: so the bias
        of a row that is not in the image must not be added.
        """
        height, width = self.image
        source = Map(0, 0, height, width, IMAGE_FEATURES, above=2)
        above = _by_place(network.rows_above)  # [2, 3, channels + 1, filters]
        above[1, 1, -1] += network.rows_above.bias
        down = self._add(Kind.IMAGE, source, self._map(0), list(above.flatten(0, 1)), None, (2, 3), (-2, -1), down=True)
        beside = torch.zeros_like(above)  # the row above the pixel, then its own
        row_above, left = _by_place(network.row_above), _by_place(network.left)
        beside[0] += row_above[0]
        beside[0, 1, -1] += network.row_above.bias
        beside[:, 0] += left[:, 0]
        beside[1, 0, -1] += network.left.bias
        return down, self._add(Kind.IMAGE, source, self._map(0), list(beside.flatten(0, 1)), None, (2, 3), (-1, -1))

    def _resnet(self, layer: GatedResnet, x: Map, skips: list[Map | None], down_stream: bool) -> Map:
        present = [skip for skip in skips if skip is not None]
        kernel, corner = layer.first.kernel_size, _corner(layer.first)
        parts = list(_by_place(layer.first).flatten(0, 1))
        bias = layer.first.bias[None]
        if layer.skip is not None:
            # The short cut reads [elu(x1), elu(x2), elu(-x1), elu(-x2)], the kernel one map after the other.
            weight = layer.skip.weight[:, :, 0, 0].T.unflatten(0, (2, len(present), -1))
            parts += [part.flatten(0, 1) for part in weight.unbind(1)]
            bias = bias + layer.skip.bias
        hidden = self._add(
            Kind.ELU, x, self._map(x.level), parts, bias, kernel, corner, skips=tuple(present), down=down_stream
        )
        bias = layer.second.bias[None]
        if layer.label is not None:
            bias = bias + layer.label.weight
        parts = list(_by_place(layer.second).flatten(0, 1))
        return self._add(
            Kind.GATED, hidden, self._map(x.level), parts, bias, kernel, corner, residual=x, down=down_stream
        )

    def _downsample(self, layer: CausalConv2d, x: Map, down_stream: bool) -> Map:
        parts = list(_by_place(layer).flatten(0, 1))
        target = self._map(x.level + 1)
        return self._add(
            Kind.RAW, x, target, parts, layer.bias[None], layer.kernel_size, _corner(layer), stride=2, down=down_stream
        )

    def _upsample(self, layer: CausalConvTranspose2d, x: Map, down_stream: bool) -> Map:
        """A pixel becomes four: output (i, j) of them reads the pixel, and, of a centred kernel, the one to its right.

        Place k of the kernel puts a pixel's features at twice its column plus k, less what is cropped.
        """
        weight = layer.weight.permute(2, 3, 0, 1)  # [rows, columns, in, out]
        target = self._map(x.level - 1)
        reach = 1 + layer.crop_left
        parts = weight.new_zeros(reach, padded(self.filters), 4, padded(self.filters))
        for i in range(2):
            for j in range(2):
                for right in range(reach):
                    place = j + layer.crop_left - 2 * right
                    if 0 <= place < layer.kernel_size[1]:
                        parts[right, : self.filters, 2 * i + j, : self.filters] = weight[i, place]
        bias = layer.bias.new_zeros(4, padded(self.filters))
        bias[:, : self.filters] = layer.bias
        return self._add(
            Kind.RAW,
            x,
            target,
            list(parts.flatten(2)),
            bias.flatten()[None],
            (1, reach),
            (0, 0),
            spread=2,
            level=x.level,
            down=down_stream,
        )

    def _add(
        self,
        kind: Kind,
        source: Map,
        target: Map | None,
        parts: list[Tensor],
        bias: Tensor | None,
        kernel: tuple[int, int] = (1, 1),
        corner: tuple[int, int] = (0, 0),
        *,
        stride: int = 1,
        spread: int = 1,
        level: int | None = None,
        down: bool = False,
        skips: tuple[Map, ...] = (),
        residual: Map | None = None,
    ) -> Map:
        signs, gates = 1 + kind.activates, 1 + (kind == Kind.GATED)
        outputs = parts[0].shape[1] // gates
        bias = parts[0].new_zeros(1, outputs) if bias is None else bias
        level = level if level is not None else (target or source).level
        self.jobs.append(
            Job(
                kind,
                source,
                target,
                (kernel[0], kernel[1]),
                corner,
                stride,
                spread,
                level,
                down,
                skips,
                residual,
                pack(parts, signs, gates),
                pack_bias(bias, gates),
                outputs,
            )
        )
        return target  # type: ignore[return-value]

    def _map(self, level: int) -> Map:
        """Room for another feature map."""
        height, width = (size >> level for size in self.image)
        new = Map(self.elements, level, height, width, padded(self.filters))
        self.elements += new.slot
        return new


_Maps = tuple[Map, Map] | tuple[None, None]


def _by_place(layer: CausalConv2d) -> Tensor:
    """Weights ``[rows, columns, in, out]`` of a convolution."""
    return layer.weight.detach().permute(2, 3, 1, 0).clone()


def _corner(layer: CausalConv2d) -> tuple[int, int]:
    left, _, above, _ = layer.margins
    return -above, -left
