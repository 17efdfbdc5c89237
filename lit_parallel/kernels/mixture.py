"""Drawing pixels from PixelCNN++'s mixture of discretised logistics: one launch from the network's output to its input.

A program owns one pixel of one slot's window. It lists the probabilities of all levels of a channel, draws, and goes
on to the next channel, all on the chip; then it writes the pixel into the iterate and, encoded, into the network's
input. What it computes is :meth:`lit_parallel.conditionals.DiscretizedLogisticMixture.sample` up to rounding, with one
formula in another form: within a component with ``c`` the distance of a level from the mean and ``h`` half the width
of a level, both in units of the scale,

    sigmoid(c + h) - sigmoid(c - h) = 2 sinh(h) t / (1 + 2 cosh(h) t + t^2),    t = exp(-|c|),

which takes one exponential, and only adds positive numbers. A pixel's sums run in one order, whatever its slot and
window: the same parameters and noise give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from lit_parallel.conditionals import Conditional, DiscretizedLogisticMixture
from lit_parallel.kernels import overlap, triton_runs_on
from lit_parallel.kernels.windows import Windows

COUPLINGS = ("gumbel", "inverse_cdf", "mixture_8bit")

_MOST_COMPONENTS = 16  # one for each of the threads that share some levels

# Warps of a program: many where few programs wait for one another, few where there are more than the device holds.
_FEW_PROGRAMS = 264
_WARPS = {True: 8, False: 4}


def covers(conditional: Conditional, coupling: str, dtype: torch.dtype) -> bool:
    """Whether :func:`draw` can take the place of ``conditional.sample``."""
    return (
        type(conditional) is DiscretizedLogisticMixture
        and conditional.mixtures <= _MOST_COMPONENTS
        and coupling in COUPLINGS
        and dtype == torch.float32
    )


@triton.jit
def _not_finite(x):
    return (x - x) != 0.0  # inf - inf and nan - nan are not 0


@triton.jit
def _read(parameters, real):
    """One kind of parameter of every component, ``[1, components]``: 0 where it is not finite; and where that is."""
    x = tl.load(parameters, mask=real, other=0.0)
    bad = _not_finite(x)
    return tl.where(bad, 0.0, x), bad


@triton.jit
def _log_scale(x):
    return tl.minimum(tl.maximum(x, -7.0), 20.0)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _encode(level):
    return level * (2 / 255) - 1.0


@triton.jit
def _rounded(x):
    """To the nearest whole number, ties to even, for numbers below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _draw_level(log_weights, mean, log_scale, noise, temperature, COUPLING: tl.constexpr, TEMPERED: tl.constexpr):
    """Draw one channel's level; returns it with the log-probability that each component, ``[1, components]``, gives it.

    Components stand in a row, levels in a column, so that a thread that has some of a tile's elements has the
    parameters for them.
    """
    weights = tl.exp(log_weights - tl.max(log_weights, axis=1, keep_dims=True))
    sharpness = tl.exp(-log_scale)
    half = sharpness * (1 / 255)
    grown = tl.exp(half)
    two_cosh = grown + 1.0 / grown
    square = half * half
    series = 1.0 + square * (1 / 6) * (1.0 + square * (1 / 20) * (1.0 + square * (1 / 42)))
    two_sinh = tl.where(half < 0.5, 2.0 * half * series, grown - 1.0 / grown)

    k = tl.arange(0, 256)
    in_bits = sharpness * 1.4426950408889634  # exponents of 2
    t = tl.exp2(-tl.abs((_encode(k.to(tl.float32))[:, None] - mean) * in_bits))
    table = tl.sum(weights * two_sinh * t / (1.0 + t * (two_cosh + t)), axis=1)
    # Everything below the first level, and everything above the last, is theirs.
    below = half - (mean + 1.0) * sharpness
    above = half + (mean - 1.0) * sharpness
    first = tl.sum(weights / (1.0 + tl.exp(-below)), axis=1)
    last = tl.sum(weights / (1.0 + tl.exp(-above)), axis=1)
    table = tl.where(k == 0, first, tl.where(k == 255, last, table))
    if TEMPERED:
        table = tl.exp(tl.log(table / tl.max(table, axis=0)) / temperature)
    if COUPLING == "gumbel":
        level = tl.argmax(table / noise, axis=0)
    else:  # in whole numbers, as in the plain function
        whole = (table * (18014398509481984.0 / tl.max(table, axis=0))).to(tl.int64)
        threshold = (noise.to(tl.float64) * tl.sum(whole, axis=0).to(tl.float64)).to(tl.int64)
        level = tl.minimum(tl.sum((tl.cumsum(whole, axis=0) <= threshold).to(tl.int32), axis=0), 255)
    level = level.to(tl.float32)

    edge = (level == 0.0) | (level == 255.0)
    c = -tl.abs((_encode(level) - mean) * sharpness)
    c = tl.where(edge, tl.where(level == 0.0, below, above), c)
    t = tl.exp(-tl.abs(c))
    ratio = tl.where(edge, 1.0, two_sinh) / (1.0 + t * tl.where(edge, 1.0, two_cosh + t))
    return level, tl.minimum(c, 0.0) + tl.log(ratio)


@triton.jit
def _transform(chosen, mean, log_scale, logistic, temperature):
    """The level that logistic noise becomes in the chosen component."""
    location = tl.sum(tl.where(chosen, mean, 0.0), axis=1)
    scale = tl.exp(tl.sum(tl.where(chosen, log_scale, 0.0), axis=1)) * temperature
    value = tl.maximum(location + scale * logistic, -1.0, propagate_nan=tl.PropagateNan.ALL)
    return _rounded((tl.minimum(value, 1.0, propagate_nan=tl.PropagateNan.ALL) + 1.0) * 127.5)


@triton.jit
def _draw(
    parameters, x, image, change, noise, guess, given, sample, top, left,
    temperature, pitch, features, noise_width, height, width,
    CHANNELS: tl.constexpr, MIXTURES: tl.constexpr, COMPONENTS: tl.constexpr, COUPLING: tl.constexpr,
    TEMPERED: tl.constexpr, GIVEN: tl.constexpr, SOLVE: tl.constexpr, NEXT: tl.constexpr,
    PIXELS: tl.constexpr, COLUMNS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    slot = program // PIXELS
    pixel = program % PIXELS
    m = tl.arange(0, COMPONENTS)[None, :]
    real = m < MIXTURES
    channel = tl.arange(0, 4)
    used = channel < CHANNELS
    COLOUR: tl.constexpr = CHANNELS == 3
    if OVERLAP:
        gdc_launch_dependents()
        gdc_wait()
    owner = tl.load(sample + slot)
    row = tl.load(top + slot) + pixel // COLUMNS
    column = tl.load(left + slot) + pixel % COLUMNS
    if (owner >= 0) & (row < height):
        # All that is read, at once.
        own = parameters + program.to(tl.int64) * pitch + m
        logits, bad = _read(own, real)
        mean_0, more = _read(own + MIXTURES, real)
        bad |= more
        scale_0, more = _read(own + 2 * MIXTURES, real)
        bad |= more
        if COLOUR:
            coefficient_0, more = _read(own + 3 * MIXTURES, real)
            bad |= more
            mean_1, more = _read(own + 4 * MIXTURES, real)
            bad |= more
            scale_1, more = _read(own + 5 * MIXTURES, real)
            bad |= more
            coefficient_1, more = _read(own + 6 * MIXTURES, real)
            bad |= more
            mean_2, more = _read(own + 7 * MIXTURES, real)
            bad |= more
            scale_2, more = _read(own + 8 * MIXTURES, real)
            bad |= more
            coefficient_2, more = _read(own + 9 * MIXTURES, real)
            bad |= more
        equation = (owner.to(tl.int64) * height + row) * width + column
        noise += equation * noise_width
        if COUPLING == "gumbel":
            k = tl.arange(0, 256)
            noise_0 = tl.load(noise + k)
            if COLOUR:
                noise_1 = tl.load(noise + 256 + k)
                noise_2 = tl.load(noise + 512 + k)
        else:
            if COUPLING == "mixture_8bit":
                race = tl.load(noise + m, mask=real, other=1.0)
                noise += MIXTURES
            noise_0 = tl.load(noise)
            if COLOUR:
                noise_1 = tl.load(noise + 1)
                noise_2 = tl.load(noise + 2)
        at = equation * CHANNELS + channel
        old = tl.load(x + at, mask=used, other=0.0)
        fallback = tl.load(guess + at, mask=used, other=0.0)
        if GIVEN:
            known = tl.load(given + at, mask=used, other=0).to(tl.int1)

        log_weights = tl.where(real, logits, float("-inf"))
        if COUPLING == "mixture_8bit":
            weights = tl.exp((log_weights - tl.max(log_weights, axis=1, keep_dims=True)) / temperature)
            chosen = m == tl.argmax(weights / race, axis=1, keep_dims=True)
            level = _transform(chosen, mean_0, _log_scale(scale_0), noise_0, temperature)
        else:
            level, gain = _draw_level(
                log_weights, mean_0, _log_scale(scale_0), noise_0, temperature, COUPLING, TEMPERED
            )
        new = level + tl.zeros([4], tl.float32)
        if COLOUR:
            red = _encode(level)
            mean_1 += _tanh(coefficient_0) * red
            mean_2 += _tanh(coefficient_1) * red
            if COUPLING == "mixture_8bit":
                level = _transform(chosen, mean_1, _log_scale(scale_1), noise_1, temperature)
            else:
                log_weights += gain
                level, gain = _draw_level(
                    log_weights, mean_1, _log_scale(scale_1), noise_1, temperature, COUPLING, TEMPERED
                )
            new = tl.where(channel == 1, level, new)
            mean_2 += _tanh(coefficient_2) * _encode(level)
            if COUPLING == "mixture_8bit":
                level = _transform(chosen, mean_2, _log_scale(scale_2), noise_2, temperature)
            else:
                log_weights += gain
                level, gain = _draw_level(
                    log_weights, mean_2, _log_scale(scale_2), noise_2, temperature, COUPLING, TEMPERED
                )
            new = tl.where(channel == 2, level, new)
        # An argmax hides what is not finite.
        new = tl.where(tl.max(bad.to(tl.int32), axis=1) > 0, float("nan"), new)
        if GIVEN:
            new = tl.where(known, fallback, new)
        lost = _not_finite(new) & used
        tl.debug_barrier()  # every warp has read what is now written
        if SOLVE:
            any_lost = tl.max(lost.to(tl.int32), axis=0) > 0
            new = tl.where(any_lost, fallback, new)
            distance = tl.max(tl.where(used, tl.abs(new - old), 0.0), axis=0)
            tl.store(change + program, tl.where(any_lost, float("nan"), distance))
            seen = new
        else:
            seen = tl.where(lost, 0.0, new)
        tl.store(x + at, new, mask=used)
        place = (owner.to(tl.int64) * (height + 2) + row + 2) * (width + 2) + column + 1
        tl.store(image + place * features + channel, _encode(seen), mask=used)
        if NEXT:
            last = column + 1 == width
            tl.store(left + slot, tl.where(last, 0, column + 1))
            tl.store(top + slot, tl.where(last, row + 1, row))
    else:
        if SOLVE:
            tl.store(change + program, 0.0)


def draw_plainly(
    parameters: Tensor,
    x: Tensor,
    image: Tensor,
    change: Tensor,
    noise: Tensor,
    guess: Tensor,
    given: Tensor | None,
    windows: Windows,
    mixture: tuple[int, int],
    coupling: str,
    temperature: float,
    rows: int,
    columns: int,
    height: int,
    width: int,
    *,
    solve: bool = True,
    next_pixel: bool = False,
) -> None:
    """What :func:`draw` does."""
    conditional = DiscretizedLogisticMixture(*mixture)
    pixel = torch.arange(rows * columns, device=x.device)
    row = windows.top[:, None] + pixel // columns
    column = windows.left[:, None] + pixel % columns
    busy = (windows.sample >= 0)[:, None] & (row < height)
    if solve:
        change.masked_fill_(~busy, 0)
    owner, row, column = windows.sample[:, None].expand_as(row)[busy], row[busy], column[busy]
    at = owner, row * width + column
    new = conditional.sample(
        parameters.unflatten(0, busy.shape)[busy][:, : conditional.num_parameters], noise[at], coupling, temperature
    )
    if given is not None:
        new = torch.where(given[at], guess[at], new)
    finite = new.isfinite()
    if solve:
        finite = finite.all(dim=1, keepdim=True)
        new = torch.where(finite, new, guess[at])
        change[busy] = (new - x[at]).abs().amax(dim=1).masked_fill(~finite[:, 0], float("nan"))
    x[at] = new
    seen = conditional.encode(new if solve else torch.where(finite, new, 0))
    image[owner, row + 2, column + 1, : conditional.channels] = seen
    if next_pixel:
        moves, last = busy[:, 0], windows.left + 1 == width
        windows.top += moves & last
        windows.left.copy_(torch.where(moves, torch.where(last, 0, windows.left + 1), windows.left))


def draw(
    parameters: Tensor,
    x: Tensor,
    image: Tensor,
    change: Tensor,
    noise: Tensor,
    guess: Tensor,
    given: Tensor | None,
    windows: Windows,
    mixture: tuple[int, int],
    coupling: str,
    temperature: float,
    rows: int,
    columns: int,
    height: int,
    width: int,
    *,
    solve: bool = True,
    next_pixel: bool = False,
) -> None:
    """Draw the pixels of every slot's window, and write them into the iterate and into the network's input.

    Everything is float32 and contiguous. A slot that is idle, or whose window has left the image, only gets changes 0.

    Args:
        parameters: ``[slots * rows * columns, pitch]`` the network's output for each pixel of each slot's window, in
            raster order; what lies beyond the conditional's parameters does not matter.
        x: ``[batch, length, channels]`` the iterate, levels 0 .. 255.
        image: ``[batch, 2 + height, 1 + width + 1, features]`` the network's input in its frame: the levels encoded to
            [-1, 1] come first among the features, the others are not touched.
        change: ``[slots, rows * columns]`` takes the largest distance between old and new over a pixel's channels,
            not-a-number where the new value was not finite.
        noise: ``[batch, length, noise width]`` of the coupling, finite.
        guess: ``[batch, length, channels]`` finite.
        given: ``[batch, length, channels]`` bool: where the value is the guess, whatever was drawn; or ``None``.
        windows: Says which sample and position a slot's window has.
        mixture: Channels and components of the :class:`~lit_parallel.conditionals.DiscretizedLogisticMixture`.
        coupling: One of :data:`COUPLINGS`.
        temperature: As in sampling.
        rows: Of the window.
        columns: Of the window.
        height: Of the image.
        width: Of the image.
        solve: A pixel that is not finite is replaced by its guess. Otherwise, as in one sweep pixel by pixel, what is
            not finite is written as it is (into the network's input as level 0), and changes are left alone.
        next_pixel: Afterwards move the position of a window of one pixel on by one, in raster order.
    """
    if next_pixel and rows * columns != 1:
        raise ValueError("only a window of one pixel moves on by one pixel")
    if not triton_runs_on(x.device):
        draw_plainly(
            parameters, x, image, change, noise, guess, given, windows, mixture, coupling, temperature,
            rows, columns, height, width, solve=solve, next_pixel=next_pixel,
        )  # fmt: skip
        return
    channels, mixtures = mixture
    programs = windows.slots * rows * columns
    _draw[(programs,)](
        parameters,
        x,
        image,
        change,
        noise,
        guess,
        guess if given is None else given,
        windows.sample,
        windows.top,
        windows.left,
        temperature,
        parameters.shape[1],
        image.shape[3],
        noise.shape[2],
        height,
        width,
        channels,
        mixtures,
        triton.next_power_of_2(mixtures),
        coupling,
        temperature != 1,
        given is not None,
        solve,
        next_pixel,
        rows * columns,
        columns,
        num_warps=_WARPS[programs <= _FEW_PROGRAMS],
        enable_fp_fusion=False,  # encoded as by the plain function, bit for bit
        **overlap(x.device, programs),
    )
