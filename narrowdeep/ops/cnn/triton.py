"""The convolution chain on a GPU: what its kernels (``ops/triton_kernels.py``) take, and the weight gradient kernel."""

# ruff: noqa: RUF005 (the kernel language has no starred tuples)
from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowdeep.ops import triton_backward, triton_chain, triton_common, triton_second
from narrowdeep.ops.cnn.layered import CONVOLUTION
from narrowdeep.ops.triton_affine import strip_length
from narrowdeep.ops.triton_common import Block, empty, launch, prefetched


@triton.jit(do_not_specialize=["batch", "splits"])
def weight_gradient(
    g_ptr,
    h_ptr,
    weight_ptr,
    bias_ptr,
    batch,
    splits,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum over samples and positions of G h^T and of G. Program (layer and split, row group * input channel).

    g, h: (layers, n, positions * B); weight: (splits, layers, n, n, f * f); bias: (splits, layers, n).
    """
    RADIUS: tl.constexpr = TAP // 2
    TAPS: tl.constexpr = TAP * TAP
    batch = batch.to(tl.int64)
    columns = batch * (HEIGHT * LENGTH)
    # Layers and splits share the one dimension of a grid that takes more than 65,535.
    layers = tl.num_programs(0) // splits
    layer = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    row = tl.program_id(1) // WIDTH * ROWS
    channel = tl.program_id(1) % WIDTH
    g_ptr += layer * WIDTH * columns
    h_ptr += (layer * WIDTH + channel) * columns
    sums = ()
    for _ in tl.static_range(ROWS * (TAPS + 1)):
        sums = sums + (tl.zeros((BLOCK,), g_ptr.dtype.element_ty),)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, columns), BLOCK):
        column = start + tl.arange(0, BLOCK)
        y = column // batch // LENGTH
        x = column // batch % LENGTH
        values = ()
        for t in tl.static_range(TAPS):
            down = t // TAP - RADIUS
            right = t % TAP - RADIUS
            inside = (y + down >= 0) & (y + down < HEIGHT) & (x + right >= 0) & (x + right < LENGTH)
            shift = (down * LENGTH + right) * batch
            values = values + (tl.load(h_ptr + column + shift, mask=inside & (column < columns), other=0.0),)
        new = ()
        for i in tl.static_range(ROWS):
            unit = tl.minimum(row + i, WIDTH - 1)  # rows past the last are computed and dropped
            g = tl.load(g_ptr + unit * columns + column, mask=column < columns, other=0.0)
            for t in tl.static_range(TAPS):
                new = new + (tl.fma(g, values[t], sums[i * (TAPS + 1) + t]),)
            new = new + (sums[i * (TAPS + 1) + TAPS] + g,)
        sums = new
    for i in tl.static_range(ROWS):
        cell = (split * layers + layer) * WIDTH + row + i
        for t in tl.static_range(TAPS):
            place = (cell * WIDTH + channel) * TAPS + t
            tl.store(weight_ptr + place, tl.sum(sums[i * (TAPS + 1) + t], axis=0), row + i < WIDTH)
        total = tl.sum(sums[i * (TAPS + 1) + TAPS], axis=0)
        tl.store(bias_ptr + cell, total, (row + i < WIDTH) & (channel == 0))


_MOST_LANES = 1024
"""Positions of an image, rounded up to a power of two, must fit one program."""

_MOST_CHANNELS = {torch.float32: 16, torch.float64: 12}
"""Hidden channels a lane holds without spills; in the tangent kernel half as many."""

_SECOND = ("tangents", "backward_jvp")
"""Kernels of second derivatives: from 5 channels on they spill a few bytes on one architecture or another."""

_MOST_TAP = 5
"""Largest filter: a layer's taps are unrolled."""

_SHUFFLED = ("forward", "recompute", "backward", "jvp")
"""Kernels whose lanes may ask one another for their neighbours, in float32: in float64 they would be no faster."""

_MOST_ENTRIES = 24
"""Units times positions that such a lane holds; in the tangent kernel half as many."""

_SPLIT = 8192
"""Columns that a program of ``weight_gradient`` sums: constant, so that the shape alone fixes the order of the sum."""


def _most_channels(kernel: str, dtype: torch.dtype) -> int:
    return 4 if kernel in _SECOND else _MOST_CHANNELS[dtype] // (2 if kernel == "jvp" else 1)


def supported(kernel: str, x: Tensor, weight: Tensor) -> bool:
    """Whether ``kernel`` takes this chain, of hidden weights (layers, n, n, f, f)."""
    if kernel == "whole":
        return False
    layers, channels, _, tap, _ = weight.shape
    most = _most_channels(kernel, x.dtype)
    if kernel in _SECOND and x.dtype == torch.float64 and 80 <= triton_common.capability(x.device) < 90:
        most = min(most, 2)  # three spill 8 bytes there
    lanes = triton.next_power_of_2(max(1, x.shape[2] * x.shape[3]))
    return x.shape[0] > 0 and layers > 0 and 0 < channels <= most and tap <= _MOST_TAP and lanes <= _MOST_LANES


def limits(kernel: str) -> str:
    """What ``supported`` asks for, in words."""
    most = ", ".join(f"{_most_channels(kernel, d)} in {str(d).removeprefix('torch.')}" for d in _MOST_CHANNELS)
    most += " (2 on sm_80 to sm_89)" if kernel in _SECOND else ""
    return f"channels <= {most}, filter <= {_MOST_TAP} x {_MOST_TAP}, at most {_MOST_LANES} positions"


def blocks(kernel: str, x: Tensor, weight: Tensor, offset: bool) -> list[Block]:
    """As many columns a lane as the registers take without spills; one sample a program where the batch is small.

    Images that fit a warp take the number of samples that leaves the fewest of its lanes idle. Else 168 registers let
    three programs of four warps share a multiprocessor.
    """
    target, narrow = triton_common.capability(x.device), weight.shape[1] <= 4
    most = _MOST_ENTRIES if target == 90 else 21  # 24 spill up to 56 bytes on others
    most = most // (2 if kernel == "jvp" else 1) // weight.shape[1]
    spans = {samples: strip_length(x.shape[2], x.shape[3], samples) for samples in (32, 16, 8, 4, 2, 1)}
    fitting = [samples for samples, span in spans.items() if 0 < span <= most]
    if fitting and kernel in _SHUFFLED and x.dtype == torch.float32:
        best = min(fitting, key=lambda samples: spans[samples] / samples)
        return [Block(samples, 1, 255, shuffled=True) for samples in sorted({best, fitting[-1]}, reverse=True)]
    lanes = triton.next_power_of_2(x.shape[2] * x.shape[3])
    a_lane = (2 if narrow else 1) * (2 if x.dtype == torch.float32 else 1)
    if target >= 100:
        a_lane = min(a_lane, 2)  # four spill up to 32 bytes there
    if target < 80 and not narrow:
        a_lane = 1  # two spill 8 bytes there
    limit = 168 if narrow else None
    if kernel in _SECOND:
        single = x.dtype == torch.float32
        a_lane = 2 if single or weight.shape[1] < 4 else 1
        limit = 168 if single and weight.shape[1] < 4 else 255
    samples = max(1, 128 * a_lane // lanes)
    return [
        Block(samples, max(1, min(8, lanes * samples // (32 * a_lane))), limit),
        # 255 registers make the tangents of one sample in float64 spill on sm_90.
        Block(1, max(1, min(8, lanes // 32)), None if (kernel, x.dtype) == ("tangents", torch.float64) else limit),
    ]


def _constants(kernel: str, x: Tensor, weight: Tensor) -> dict[str, Any]:
    shape = {"TAP": weight.shape[-1], "HEIGHT": x.shape[2], "LENGTH": x.shape[3]}
    return {"ROWS": 1, "PREFETCH": prefetched(weight)} | shape


def weight_gradient_rows(channels: int, tap: int) -> int:
    """Rows of a filter a program of ``weight_gradient`` sums: rows (f^2 + 1) sums a lane have to fit the registers."""
    return max(1, min(channels, 60 // (tap**2 + 1)))


def sum_weight_gradients(g: Tensor, h: Tensor, weight_grad: Tensor, bias_grad: Tensor) -> None:
    """Gradients of some layers: g and h (layers, n, H, W, B) to (layers, n, n, f, f) and (layers, n)."""
    layers, channels, height, length, batch = g.shape
    tap = weight_grad.shape[-1]
    splits = triton.cdiv(height * length * batch, _SPLIT)
    rows = weight_gradient_rows(channels, tap)
    groups = triton.cdiv(channels, rows)
    whole = splits == 1  # the one sum is the gradient
    weights = weight_grad if whole else empty(g, splits, layers, channels, channels, tap, tap)
    biases = bias_grad if whole else empty(g, splits, layers, channels)
    constants = {"WIDTH": channels, "ROWS": rows, "TAP": tap, "HEIGHT": height, "LENGTH": length, "SPLIT": _SPLIT}
    grid = (layers * splits, groups * channels)
    launch(weight_gradient, grid, g, h, weights, biases, batch, splits, num_warps=4, BLOCK=128, **constants)
    if not whole:
        torch.sum(weights, dim=0, out=weight_grad)
        torch.sum(biases, dim=0, out=bias_grad)


FAMILY = triton_chain.Family(CONVOLUTION, supported, blocks, _constants, sum_weight_gradients)

cnn_forward = partial(triton_chain.forward, FAMILY)
cnn_backward = partial(triton_backward.backward, FAMILY)
cnn_jvp = partial(triton_chain.jvp, FAMILY)
cnn_backward_jvp = partial(triton_second.backward_jvp, FAMILY)
