"""The MLP chain on a GPU: what its kernels (``ops/triton_kernels.py``) take, and the weight gradient kernel."""

# ruff: noqa: RUF005 (the kernel language has no starred tuples)
from __future__ import annotations

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowdeep.ops import triton_backward, triton_chain, triton_common, triton_second
from narrowdeep.ops.mlp.layered import LINEAR
from narrowdeep.ops.triton_common import TILE, Block, empty, launch, prefetched, read_state
from narrowdeep.ops.triton_dispatch import spares


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
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """sum over samples of G h^T and of G. Program (layer and split, rows): ROWS rows of a layer over SPLIT samples.

    g, h: (layers, n, B); weight: (splits, layers, n, n); bias: (splits, layers, n).
    """
    batch = batch.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    # Layers and splits share the one dimension of a grid that takes more than 65,535.
    layers = tl.num_programs(0) // splits
    layer = (tl.program_id(0) // splits).to(tl.int64)
    split = (tl.program_id(0) % splits).to(tl.int64)
    row = tl.program_id(1) * ROWS
    g_ptr += layer * WIDTH * batch
    h_ptr += layer * WIDTH * batch
    sums = ()
    for _ in tl.static_range(ROWS * (WIDTH + 1)):
        sums = sums + (tl.zeros((BLOCK,), g_ptr.dtype.element_ty),)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, batch), BLOCK):
        column = start + tl.arange(0, BLOCK)
        h = read_state(h_ptr, ((column,), (column < batch,)), batch, WIDTH, 1)
        new = ()
        for i in tl.static_range(ROWS):
            unit = tl.minimum(row + i, WIDTH - 1)  # rows past the last are computed and dropped
            g = tl.load(g_ptr + unit * batch + column, mask=column < batch, other=0.0)
            for k in tl.static_range(WIDTH):
                new = new + (sums[i * (WIDTH + 1) + k] + g * h[k],)
            new = new + (sums[i * (WIDTH + 1) + WIDTH] + g,)
        sums = new
    cell = (split * layers + layer) * WIDTH + row
    for i in tl.static_range(ROWS):
        for k in tl.static_range(WIDTH):
            tl.store(weight_ptr + (cell + i) * WIDTH + k, tl.sum(sums[i * (WIDTH + 1) + k], axis=0), row + i < WIDTH)
        tl.store(bias_ptr + cell + i, tl.sum(sums[i * (WIDTH + 1) + WIDTH], axis=0), row + i < WIDTH)


_SECOND = ("tangents", "backward_jvp")
_TANGENTS = ("jvp", *_SECOND)

_NARROW = {"forward": 16, "recompute": 16, "backward": 16, "whole": 4} | dict.fromkeys(_TANGENTS, 8)
"""Widest layer that runs one sample a lane. A state and its tangent of 16 units each would not fit the registers."""

_NARROW_RECORD = 8
"""The same in float64, where tiles have tensor cores, and on sm_75: the record of 16 units would not fit."""

_TILED = {
    ("forward", torch.float32): 80,
    ("forward", torch.float64): 32,
    ("jvp", torch.float32): 32,
    ("jvp", torch.float64): 16,
}
"""Widest layer that runs in ``tl.dot`` tiles without spills; the backward as the forward. cuBLAS takes over past it."""

_WIDEST_TURING = 32
"""The same on sm_75, which cannot copy to shared memory past the registers. Second derivatives in float64 stop at 4."""

_SAMPLES: dict[Any, tuple[int, ...]] = {
    # kernel, dtype, offset: samples a lane at widths up to 4, 8, 16. The most that needs no spill (docs/gpu.md), since
    # a load of weights then serves that many multiply-adds; at width 4 no more than pay beside records read ahead.
    ("forward", torch.float32, False): (4, 4, 4),
    ("forward", torch.float32, True): (4, 4, 2),
    ("forward", torch.float64, False): (4, 4),
    ("forward", torch.float64, True): (4, 2),
    ("recompute", torch.float32, False): (4, 4, 4),
    ("recompute", torch.float32, True): (4, 4, 2),
    ("recompute", torch.float64, False): (4, 4),
    ("recompute", torch.float64, True): (4, 2),
    ("backward", torch.float32, False): (4, 4, 4),
    ("backward", torch.float32, True): (4, 4, 2),
    ("backward", torch.float64, False): (4, 4),
    ("backward", torch.float64, True): (2, 2),
    ("jvp", torch.float32, False): (4, 2),
    ("jvp", torch.float32, True): (4, 2),
    ("jvp", torch.float64, False): (4, 2),
    ("jvp", torch.float64, True): (2, 1),
}

_SAMPLES |= {(kernel, *key[1:]): most for key, most in _SAMPLES.items() if key[0] == "jvp" for kernel in _SECOND}

_SAMPLES_BLACKWELL: dict[Any, tuple[int, ...]] = {("backward_jvp", torch.float32, True): (4, 1)}
"""The same where sm_100 needs fewer: two samples a lane spill 8 bytes at width 8."""

_SAMPLES_TURING: dict[Any, tuple[int, ...]] = {("tangents", torch.float32, True): (4, 1)}
"""The same on sm_75."""

_AHEAD = {torch.float32: 2, torch.float64: 1}
"""Layers that records are read ahead up to width 4; wider ones would take the registers of the states."""

_SPLIT = 16_384
"""Samples that a program of ``weight_gradient`` sums: constant, so that the batch alone fixes the order of the sum."""


_WHOLE = 4
"""Widest layer of which a backward may be one launch: 20 sums of a layer are added up by 32 lanes."""

_WHOLE_BATCH = 8192
"""Fewest samples for that: with fewer, segments side by side are worth more than launches and memory saved."""


def widest(kernel: str, dtype: torch.dtype, target: int = 90) -> int:
    """Widest layer that ``kernel`` runs on sm_``target``; a wider chain runs one layer at a time."""
    most = _TILED["jvp" if kernel in _TANGENTS else "forward", dtype]
    if target >= 80:
        return most
    return 4 if kernel in _SECOND and dtype == torch.float64 else min(most, _WIDEST_TURING)


def narrow(kernel: str, x: Tensor) -> int:
    """Widest layer of which ``kernel`` runs one sample a lane, or a few lanes a sample on tensor cores."""
    short = x.dtype == torch.float64 or triton_common.capability(x.device) < 80
    return min(_NARROW[kernel], _NARROW_RECORD) if short else _NARROW[kernel]


def supported(kernel: str, x: Tensor, weight: Tensor) -> bool:
    """Whether ``kernel`` takes this chain, of hidden weights (layers, n, n)."""
    layers, width, _ = weight.shape
    if kernel == "whole" and (width > _WHOLE or x.shape[0] < _WHOLE_BATCH or spares(x.device)):
        return False
    most = widest(kernel, x.dtype, triton_common.capability(x.device))
    return 0 < width <= most and layers > 0 and x.shape[0] > 0


def fragments(kernel: str, x: Tensor, width: int, offset: bool) -> bool:
    """Whether tensor cores take the products: float32 from width 5 on, in offset form.

    There a product is a small part of a state. In plain form it is all of it, and what tensor cores cut off in every
    layer where others round would add up. The interpreter has no tensor cores, nor sm_75 such that take float32.
    """
    able = triton_common.capability(x.device) >= 80 and not triton_common.INTERPRETED
    return offset and 4 < width <= 16 and x.dtype == torch.float32 and kernel in triton_chain.PACKED and able


def blocks(kernel: str, x: Tensor, weight: Tensor, offset: bool) -> list[Block]:
    """Blocks of samples to choose from, the one with the best instruction mix first (4 warps share cached weights)."""
    width = weight.shape[1]
    if width > narrow(kernel, x):
        tangents = kernel in _TANGENTS
        limit = 255 if kernel == "recompute" or tangents else None
        if width > {"recompute": 64, "tangents": 16}.get(kernel, width):
            return [Block(16, 8, limit)]  # 32 samples spill up to 24 bytes on sm_80
        turing = triton_common.capability(x.device) < 80 and x.dtype == torch.float64  # four warps spill there
        return [Block(32, 4 if width <= 32 and not tangents and not turing else 8, limit)]
    if kernel == "whole":
        ahead = 1 if x.dtype == torch.float32 else 0  # more would spill
        return [Block(64, 1, 255, ahead), Block(32, 1, 255, ahead)]
    if fragments(kernel, x, width, offset):
        many, few = (2, 2) if width <= 8 else (1, 2) if kernel == "forward" else (0, 0)  # more would spill
        # Left alone, ptxas takes 128 on sm_86 and sm_89, and spills; on sm_90 so many that three programs fit for four.
        four = 128 if triton_common.capability(x.device) == 90 else 168
        limit = {("recompute", False): 168, ("backward", True): four}.get((kernel, width > 8))
        return [Block(64, 4, limit, many, True), Block(16, 1, 255, few, True)]
    target = triton_common.capability(x.device)
    table = _SAMPLES | (_SAMPLES_BLACKWELL if target >= 100 else _SAMPLES_TURING if target < 80 else {})
    most = table[kernel, x.dtype, offset][0 if width <= 4 else 1 if width <= 8 else 2]
    sizes = [most >> i for i in range(4) if most >> i]
    double = x.dtype == torch.float64
    spilling = double and (kernel.startswith("backward") or (width > 4 and target >= 80))
    spilling |= target >= 100 and width <= 4
    if target < 80 and kernel in ("forward", "recompute"):
        spilling |= (width > 4) != (double and kernel == "recompute")  # there it is the other way round
    limit = 255 if spilling else None
    ahead = _AHEAD[x.dtype] if width <= 4 else 0
    return [Block(128 * size, 4, limit, ahead) for size in sizes] + [Block(32, 1, 255, ahead)]


def _constants(kernel: str, x: Tensor, weight: Tensor) -> dict[str, Any]:
    rows = 1 if weight.shape[1] <= narrow(kernel, x) else TILE
    return {"ROWS": rows, "TAP": 0, "HEIGHT": 1, "LENGTH": 1, "PREFETCH": prefetched(weight)}


def weight_gradient_block(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, samples) of a program of ``weight_gradient``: rows (n + 1) sums a lane have to fit the registers."""
    if width <= 4:
        return width, (512 if dtype == torch.float32 else 256)
    if width <= 8:
        return width, 128
    return (8 if dtype == torch.float32 else 4), 128


def sum_weight_gradients(g: Tensor, h: Tensor, weight_grad: Tensor, bias_grad: Tensor) -> None:
    """Gradients of some layers: g and h (layers, n, B) to (layers, n, n) and (layers, n)."""
    layers, width, batch = g.shape
    if width > _NARROW["backward"]:
        torch.bmm(g, h.transpose(1, 2), out=weight_grad)
        torch.sum(g, dim=2, out=bias_grad)
        return
    splits = triton.cdiv(batch, _SPLIT)
    rows, samples = weight_gradient_block(width, g.dtype)
    grid = (layers * splits, triton.cdiv(width, rows))
    whole = splits == 1  # the one sum is the gradient
    weights = weight_grad if whole else empty(g, splits, layers, width, width)
    biases = bias_grad if whole else empty(g, splits, layers, width)
    constants = {"WIDTH": width, "ROWS": rows, "SPLIT": _SPLIT, "BLOCK": samples, "ALIGNED": batch % 4 == 0}
    launch(weight_gradient, grid, g, h, weights, biases, batch, splits, num_warps=4, **constants)
    if not whole:
        torch.sum(weights, dim=0, out=weight_grad)
        torch.sum(biases, dim=0, out=bias_grad)


FAMILY = triton_chain.Family(LINEAR, supported, blocks, _constants, sum_weight_gradients)

mlp_forward = partial(triton_chain.forward, FAMILY)
mlp_backward = partial(triton_backward.backward, FAMILY)
mlp_jvp = partial(triton_chain.jvp, FAMILY)
mlp_backward_jvp = partial(triton_second.backward_jvp, FAMILY)
