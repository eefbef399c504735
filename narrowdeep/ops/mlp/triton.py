"""The MLP chain's Triton kernels: all hidden layers in one launch, one program a block of samples.

The first and the last affine layer are one matrix product each and stay with torch (``ops/layered.py``); the kernels
see the L-2 hidden layers. States are numbered from 0 here (state ``s`` of ``reference.py`` is ``s - 1``), so that
hidden layer ``j`` takes state ``j`` to state ``j + 1``.

The backward goes down a group of segments at a time: ``chain_recompute`` computes their states from the saved ones,
segments in parallel; ``chain_backward`` follows the gradient G through them; ``weight_gradient`` sums G h^T over the
batch, layers in parallel. Those sums would cost more than the layer inside the chain, and only the chain is serial.
No float atomics: results are the same from run to run.
"""

# ruff: noqa: RUF005, SIM102 (the kernel language has no starred tuples, and a constexpr `if` must stand alone)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowdeep.ops import layered
from narrowdeep.ops.mlp import layered as mlp_layered
from narrowdeep.ops.mlp.layered import LINEAR
from narrowdeep.ops.reference import saved_shape
from narrowdeep.ops.triton_common import (
    MOVE_PERIOD,
    PREFETCH,
    TILE,
    Block,
    add_kept,
    add_states,
    choose_block,
    clip,
    empty,
    launch,
    mask_gradient,
    move,
    prefetch,
    product,
    read_bias,
    read_state,
    write_state,
    zeros_like_state,
)

_LOOSE = ["batch", "layers", "segment", "first", "last"]  # integers that must not make another kernel


@triton.jit
def _advance(
    base,
    moved,
    a,
    fixed_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    start,
    stop,
    layers,
    column,
    batch,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STORE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Take (base, moved, a) from state start to state stop. STORE: write state s to h_ptr[s] for start <= s < stop."""
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    for chunk in range(start // MOVE_PERIOD, (stop + MOVE_PERIOD - 1) // MOVE_PERIOD):
        low = tl.maximum(chunk * MOVE_PERIOD, start)
        high = tl.minimum(chunk * MOVE_PERIOD + MOVE_PERIOD, stop)
        prefetch(weight_ptr, high * WIDTH * WIDTH, layers * WIDTH * WIDTH, MOVE_PERIOD * WIDTH * WIDTH, PREFETCH)
        prefetch(bias_ptr, high * WIDTH, layers * WIDTH, MOVE_PERIOD * WIDTH, PREFETCH)
        for j in range(low, high):
            h = add_states(base, a, COUNT) if OFFSET else a
            if STORE:
                write_state(h_ptr + j * (WIDTH * batch), h, column, batch, WIDTH, ROWS)
            bias = read_bias(bias_ptr + j * WIDTH, WIDTH, ROWS)
            z = product(weight_ptr + j * (WIDTH * WIDTH), h, bias, WIDTH, ROWS, False)
            if OFFSET:
                z = add_kept(z, a, MIDDLE, COUNT, ROWS)
            a = clip(z, base, OFFSET, COUNT)
        if OFFSET:
            if high % MOVE_PERIOD == 0:
                base, moved, a = move(fixed_ptr, base, moved, a, column, batch, MIDDLE, WIDTH, ROWS)
    return base, moved, a


@triton.jit(do_not_specialize=_LOOSE)
def chain_forward(
    fixed_ptr,
    state_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    final_ptr,
    batch,
    layers,
    segment,
    SAVE: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """State 0 (``state``, (n, B)) to state ``layers`` (``final``, (2, n, B): moved and a; a alone in plain form).

    SAVE 0: nothing, 1: every h, 2: every ``segment``-th state, as ``reference.saved_shape`` says. ``fixed`` is the
    reference's base. MIDDLE is the number of the middle unit in offset form, -1 in plain form.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    batch = batch.to(tl.int64)
    layers = layers.to(tl.int64)
    segment = segment.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    matrix = WIDTH * batch
    prefetch(weight_ptr, 0, layers * WIDTH * WIDTH, MOVE_PERIOD * WIDTH * WIDTH, PREFETCH)
    prefetch(bias_ptr, 0, layers * WIDTH, MOVE_PERIOD * WIDTH, PREFETCH)
    a = read_state(state_ptr, column, batch, WIDTH, ROWS)
    base = read_state(fixed_ptr, column, batch, WIDTH, ROWS) if OFFSET else a
    moved = zeros_like_state(a, COUNT)
    for start in range(0, layers, segment):
        stop = tl.minimum(start + segment, layers)
        if SAVE == 2:
            if OFFSET:
                write_state(saved_ptr, moved, column, batch, WIDTH, ROWS)
                saved_ptr += matrix
            write_state(saved_ptr, a, column, batch, WIDTH, ROWS)
            saved_ptr += matrix
        base, moved, a = _advance(
            base, moved, a, fixed_ptr, weight_ptr, bias_ptr, saved_ptr, start, stop, layers, column, batch,
            MIDDLE, WIDTH, ROWS, SAVE == 1, PREFETCH,
        )  # fmt: skip
    if SAVE == 1:
        h = add_states(base, a, COUNT) if OFFSET else a
        write_state(saved_ptr + layers * matrix, h, column, batch, WIDTH, ROWS)
    if OFFSET:
        write_state(final_ptr, moved, column, batch, WIDTH, ROWS)
        final_ptr += matrix
    write_state(final_ptr, a, column, batch, WIDTH, ROWS)


@triton.jit(do_not_specialize=_LOOSE)
def chain_recompute(
    fixed_ptr,
    saved_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    batch,
    layers,
    segment,
    first,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Program (block, i): the states of segment first + i from the saved one at its start, and the very last state.

    ``h``, (states, n, B), begins with state first * segment.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    batch = batch.to(tl.int64)
    layers = layers.to(tl.int64)
    segment = segment.to(tl.int64)
    first = first.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    matrix = WIDTH * batch
    number = first + tl.program_id(1)
    start = number * segment
    stop = tl.minimum(start + segment, layers)
    h_ptr -= first * segment * matrix
    prefetch(weight_ptr, start * WIDTH * WIDTH, layers * WIDTH * WIDTH, MOVE_PERIOD * WIDTH * WIDTH, PREFETCH)
    if OFFSET:
        saved_ptr += 2 * number * matrix
        moved = read_state(saved_ptr, column, batch, WIDTH, ROWS)
        a = read_state(saved_ptr + matrix, column, batch, WIDTH, ROWS)
        base = add_states(read_state(fixed_ptr, column, batch, WIDTH, ROWS), moved, COUNT)
    else:
        a = read_state(saved_ptr + number * matrix, column, batch, WIDTH, ROWS)
        base = a
        moved = a
    base, moved, a = _advance(
        base, moved, a, fixed_ptr, weight_ptr, bias_ptr, h_ptr, start, stop, layers, column, batch,
        MIDDLE, WIDTH, ROWS, True, PREFETCH,
    )  # fmt: skip
    if stop == layers:
        h = add_states(base, a, COUNT) if OFFSET else a
        write_state(h_ptr + layers * matrix, h, column, batch, WIDTH, ROWS)


@triton.jit(do_not_specialize=_LOOSE)
def chain_backward(
    fixed_ptr,
    weight_ptr,
    h_ptr,
    grad_in_ptr,
    grad_out_ptr,
    g_ptr,
    batch,
    layers,
    first,
    last,
    STORE: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Layers last-1 down to first. STORE: G of states first+1 .. last to ``g``, (last - first, n, B).

    ``grad_in`` and ``grad_out``, (2, n, B): moved and g of the gradient before ReLU ``last`` and ``first`` (g alone in
    plain form); where ``last`` is the very last state ``grad_in`` has still to pass its ReLU. ``fixed`` is R.
    ``h``, (states, n, B), begins with state first.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    batch = batch.to(tl.int64)
    layers = layers.to(tl.int64)
    first = first.to(tl.int64)
    last = last.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    matrix = WIDTH * batch
    h_ptr -= first * matrix
    g_ptr -= (first + 1) * matrix
    if OFFSET:
        moved = read_state(grad_in_ptr, column, batch, WIDTH, ROWS)
        base = add_states(read_state(fixed_ptr, column, batch, WIDTH, ROWS), moved, COUNT)
        g = read_state(grad_in_ptr + matrix, column, batch, WIDTH, ROWS)
    else:
        g = read_state(grad_in_ptr, column, batch, WIDTH, ROWS)
        moved = g
        base = g
    if last == layers:
        h = read_state(h_ptr + last * matrix, column, batch, WIDTH, ROWS)
        g = mask_gradient(h, g, base, OFFSET, COUNT)
    for down in range(0, last // MOVE_PERIOD - (first + 1) // MOVE_PERIOD + 1):
        chunk = last // MOVE_PERIOD - down
        low = tl.maximum(chunk * MOVE_PERIOD, first + 1)
        high = tl.minimum(chunk * MOVE_PERIOD + MOVE_PERIOD - 1, last)
        ahead = tl.maximum(low - 1 - MOVE_PERIOD, 0) * (WIDTH * WIDTH)
        prefetch(weight_ptr, ahead, layers * WIDTH * WIDTH, MOVE_PERIOD * WIDTH * WIDTH, PREFETCH)
        for i in range(0, high - low + 1):
            s = high - i
            full = add_states(base, g, COUNT) if OFFSET else g
            if STORE:
                write_state(g_ptr + s * matrix, full, column, batch, WIDTH, ROWS)
            h = read_state(h_ptr + (s - 1) * matrix, column, batch, WIDTH, ROWS)
            weight = weight_ptr + (s - 1) * (WIDTH * WIDTH)
            grad = product(weight, full, zeros_like_state(g, COUNT), WIDTH, ROWS, True)
            if OFFSET:
                grad = add_kept(grad, g, MIDDLE, COUNT, ROWS)
            g = mask_gradient(h, grad, base, OFFSET, COUNT)
        if OFFSET:
            if low % MOVE_PERIOD == 0:
                base, moved, g = move(fixed_ptr, base, moved, g, column, batch, MIDDLE, WIDTH, ROWS)
    if OFFSET:
        write_state(grad_out_ptr, moved, column, batch, WIDTH, ROWS)
        grad_out_ptr += matrix
    write_state(grad_out_ptr, g, column, batch, WIDTH, ROWS)


@triton.jit(do_not_specialize=["batch"])
def weight_gradient(
    g_ptr,
    h_ptr,
    partial_ptr,
    batch,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """sum over samples of G h^T and of G. Program (layer, rows, split): ROWS rows of one layer over SPLIT samples.

    g, h: (layers, n, B); partial: (splits, layers, row groups * ROWS, n + 1), the last column is the bias.
    """
    batch = batch.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    layer = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS
    split = tl.program_id(2).to(tl.int64)
    g_ptr += layer * WIDTH * batch
    h_ptr += layer * WIDTH * batch
    sums = ()
    for _ in tl.static_range(ROWS * (WIDTH + 1)):
        sums = sums + (tl.zeros((BLOCK,), g_ptr.dtype.element_ty),)
    for start in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, batch), BLOCK):
        column = start + tl.arange(0, BLOCK)
        h = read_state(h_ptr, column, batch, WIDTH, 1)
        new = ()
        for i in tl.static_range(ROWS):
            unit = tl.minimum(row + i, WIDTH - 1)  # rows past the last are computed and dropped
            g = tl.load(g_ptr + unit * batch + column, mask=column < batch, other=0.0)
            for k in tl.static_range(WIDTH):
                new = new + (sums[i * (WIDTH + 1) + k] + g * h[k],)
            new = new + (sums[i * (WIDTH + 1) + WIDTH] + g,)
        sums = new
    partial_ptr += ((split * tl.num_programs(0) + layer) * (tl.num_programs(1) * ROWS) + row) * (WIDTH + 1)
    for i in tl.static_range(ROWS):
        for k in tl.static_range(WIDTH + 1):
            tl.store(partial_ptr + i * (WIDTH + 1) + k, tl.sum(sums[i * (WIDTH + 1) + k], axis=0))


@triton.jit(do_not_specialize=_LOOSE)
def chain_jvp(
    fixed_ptr,
    state_ptr,
    tangent_fixed_ptr,
    tangent_ptr,
    weight_ptr,
    bias_ptr,
    weight_t_ptr,
    bias_t_ptr,
    final_ptr,
    batch,
    layers,
    HAS_WEIGHT_T: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """States and tangents together: from (``state``, ``tangent``) to ``final``, (4, n, B): moved and a of the state,
    moved and tau of the tangent; (2, n, B), a and tau, in plain form. ``tangent_fixed`` is D."""
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    batch = batch.to(tl.int64)
    layers = layers.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    matrix = WIDTH * batch
    a = read_state(state_ptr, column, batch, WIDTH, ROWS)
    tau = read_state(tangent_ptr, column, batch, WIDTH, ROWS)
    base = read_state(fixed_ptr, column, batch, WIDTH, ROWS) if OFFSET else a
    base_t = read_state(tangent_fixed_ptr, column, batch, WIDTH, ROWS) if OFFSET else tau
    moved = zeros_like_state(a, COUNT)
    moved_t = zeros_like_state(a, COUNT)
    prefetch(weight_ptr, 0, layers * WIDTH * WIDTH, MOVE_PERIOD * WIDTH * WIDTH, PREFETCH)
    for chunk in range(0, (layers + MOVE_PERIOD - 1) // MOVE_PERIOD):
        low = chunk * MOVE_PERIOD
        high = tl.minimum(low + MOVE_PERIOD, layers)
        prefetch(weight_ptr, high * WIDTH * WIDTH, layers * WIDTH * WIDTH, MOVE_PERIOD * WIDTH * WIDTH, PREFETCH)
        if HAS_WEIGHT_T:
            prefetch(weight_t_ptr, high * WIDTH * WIDTH, layers * WIDTH * WIDTH, MOVE_PERIOD * WIDTH * WIDTH, PREFETCH)
        for j in range(low, high):
            h = add_states(base, a, COUNT) if OFFSET else a
            full = add_states(base_t, tau, COUNT) if OFFSET else tau
            dz = read_bias(bias_t_ptr + j * WIDTH, WIDTH, ROWS) if HAS_BIAS_T else zeros_like_state(tau, COUNT)
            if HAS_WEIGHT_T:
                dz = product(weight_t_ptr + j * (WIDTH * WIDTH), h, dz, WIDTH, ROWS, False)
            dz = product(weight_ptr + j * (WIDTH * WIDTH), full, dz, WIDTH, ROWS, False)
            bias = read_bias(bias_ptr + j * WIDTH, WIDTH, ROWS)
            z = product(weight_ptr + j * (WIDTH * WIDTH), h, bias, WIDTH, ROWS, False)
            if OFFSET:
                dz = add_kept(dz, tau, MIDDLE, COUNT, ROWS)
                z = add_kept(z, a, MIDDLE, COUNT, ROWS)
            a = clip(z, base, OFFSET, COUNT)
            tau = mask_gradient(add_states(base, a, COUNT) if OFFSET else a, dz, base_t, OFFSET, COUNT)
        if OFFSET:
            if high % MOVE_PERIOD == 0:
                base, moved, a = move(fixed_ptr, base, moved, a, column, batch, MIDDLE, WIDTH, ROWS)
                base_t, moved_t, tau = move(tangent_fixed_ptr, base_t, moved_t, tau, column, batch, MIDDLE, WIDTH, ROWS)
    if OFFSET:
        write_state(final_ptr, moved, column, batch, WIDTH, ROWS)
        write_state(final_ptr + 2 * matrix, moved_t, column, batch, WIDTH, ROWS)
        write_state(final_ptr + matrix, a, column, batch, WIDTH, ROWS)
        write_state(final_ptr + 3 * matrix, tau, column, batch, WIDTH, ROWS)
    else:
        write_state(final_ptr, a, column, batch, WIDTH, ROWS)
        write_state(final_ptr + matrix, tau, column, batch, WIDTH, ROWS)


_NARROW = {"forward": 16, "recompute": 16, "backward": 16, "jvp": 8}
"""Widest layer that runs one sample a lane. A state and its tangent of 16 units each would not fit the registers."""

_TILED = {
    ("forward", torch.float32): 80,
    ("forward", torch.float64): 32,
    ("jvp", torch.float32): 32,
    ("jvp", torch.float64): 16,
}
"""Widest layer that runs in ``tl.dot`` tiles without spills; the backward as the forward. cuBLAS takes over past it."""

_SAMPLES = {
    # kernel, dtype, offset: samples a lane at widths up to 4, 8, 16. The most that needs no spill (docs/gpu.md): a
    # scalar load of a weight then serves that many multiply-adds.
    ("forward", torch.float32, False): (8, 4, 4),
    ("forward", torch.float32, True): (8, 4, 2),
    ("forward", torch.float64, False): (4, 4, 2),
    ("forward", torch.float64, True): (4, 2, 1),
    ("recompute", torch.float32, False): (8, 4, 4),
    ("recompute", torch.float32, True): (8, 4, 2),
    ("recompute", torch.float64, False): (4, 4, 2),
    ("recompute", torch.float64, True): (4, 2, 1),
    ("backward", torch.float32, False): (8, 4, 4),
    ("backward", torch.float32, True): (8, 4, 2),
    ("backward", torch.float64, False): (4, 4, 2),
    ("backward", torch.float64, True): (4, 2, 1),
    ("jvp", torch.float32, False): (4, 2),
    ("jvp", torch.float32, True): (4, 2),
    ("jvp", torch.float64, False): (4, 2),
    ("jvp", torch.float64, True): (2, 1),
}

_SPLIT = 4096
"""Samples that a program of ``weight_gradient`` sums: constant, so that the batch alone fixes the order of the sum."""

_SCRATCH_BYTES = 32 << 20
"""What the states and gradients of a group of segments may take: they then stay in the second-level cache (40 MiB on
an A100, 50 MiB on an H100) between the kernel that writes them and the one that reads them. One segment always fits."""


def widest(kernel: str, dtype: torch.dtype) -> int:
    """Widest layer that ``kernel`` runs; a wider chain runs one layer at a time."""
    return _TILED["jvp" if kernel == "jvp" else "forward", dtype]


def supported(kernel: str, x: Tensor, hidden_weight: Tensor) -> bool:
    """Whether ``kernel`` takes this chain."""
    layers, width, _ = hidden_weight.shape
    return 0 < width <= widest(kernel, x.dtype) and layers > 0 and x.shape[0] > 0


def blocks(kernel: str, width: int, dtype: torch.dtype, offset: bool) -> list[Block]:
    """Blocks of samples to choose from, the one with the best instruction mix first (4 warps share cached weights)."""
    if width > _NARROW[kernel]:
        return [Block(32, 4 if width <= 32 and kernel != "jvp" else 8)]
    most = _SAMPLES[kernel, dtype, offset][0 if width <= 4 else 1 if width <= 8 else 2]
    sizes = [most >> i for i in range(4) if most >> i]
    return [Block(128 * size, 4) for size in sizes] + [Block(32, 1)]


def constants(kernel: str, width: int, offset: bool, inputs: int, batch: int, block: Block) -> dict[str, Any]:
    """The constants that every chain kernel takes."""
    return {
        "MIDDLE": inputs if offset else -1,
        "WIDTH": width,
        "ROWS": 1 if width <= _NARROW[kernel] else TILE,
        "BLOCK": block.samples,
        "ALIGNED": batch % 4 == 0,
        "PREFETCH": PREFETCH,
    }


def weight_gradient_block(width: int, dtype: torch.dtype) -> tuple[int, int]:
    """(rows, samples) of a program of ``weight_gradient``: rows (n + 1) sums a lane have to fit the registers."""
    if width <= 4:
        return width, (512 if dtype == torch.float32 else 256)
    if width <= 8:
        return width, 128
    return (8 if dtype == torch.float32 else 4), 128


def _run(
    kernel: Any, name: str, x: Tensor, width: int, offset: bool, args: tuple, segments: int = 1, **more: Any
) -> None:
    """Launch over the batch (and ``segments``) with the block that fits."""
    batch, inputs = x.shape

    def start(block: Block) -> None:
        grid = (triton.cdiv(batch, block.samples), segments)
        launch(
            kernel, grid, *args, num_warps=block.warps, **constants(name, width, offset, inputs, batch, block), **more
        )

    options = blocks(name, width, x.dtype, offset)
    choose_block((name, width, x.dtype, offset, segments, batch), options, batch * segments, x.device, start)


def mlp_forward(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    scale: float,
    offset: bool,
    segment: int,
) -> tuple[Tensor, Tensor]:
    """As ``reference.mlp_forward``."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    if not supported("forward", x, hidden_weight):
        return mlp_layered.mlp_forward(x, *params, scale, offset, segment)
    layers, width, _ = hidden_weight.shape
    state = layered.first_state(LINEAR, x.t(), params, scale, offset)
    saved = empty(x, *saved_shape(layers + 2, (width, x.shape[0]), offset, segment))
    final = empty(x, 2 if offset else 1, width, x.shape[0])
    args = (
        state.a if state.base is None else state.base,
        state.a,
        hidden_weight.contiguous(),
        hidden_bias.contiguous(),
        saved if segment else final,
        final,
        x.shape[0],
        layers,
        segment if segment > 1 else layers,
    )
    _run(chain_forward, "forward", x, width, offset, args, SAVE=min(segment, 2))
    state = layered.Parts(state.base, final[-1], state.middle, final[0])
    h = state.full(out=torch.empty_like(state.a))
    return layered.last_output(LINEAR, state, h, last_weight, last_bias), saved


def _sum_weight_gradients(g: Tensor, h: Tensor, weight_grad: Tensor, bias_grad: Tensor) -> None:
    """Gradients of some layers: g and h (layers, n, B) to (layers, n, n) and (layers, n)."""
    layers, width, batch = g.shape
    if width > _NARROW["backward"]:
        torch.bmm(g, h.transpose(1, 2), out=weight_grad)
        torch.sum(g, dim=2, out=bias_grad)
        return
    splits = triton.cdiv(batch, _SPLIT)
    rows, samples = weight_gradient_block(width, g.dtype)
    groups = triton.cdiv(width, rows)
    partial = empty(g, splits, layers, groups * rows, width + 1)
    launch(
        weight_gradient,
        (layers, groups, splits),
        g,
        h,
        partial,
        batch,
        num_warps=4,
        WIDTH=width,
        ROWS=rows,
        SPLIT=_SPLIT,
        BLOCK=samples,
        ALIGNED=batch % 4 == 0,
    )
    total = partial[0] if splits == 1 else partial.sum(0)
    weight_grad.copy_(total[:, :width, :width])
    bias_grad.copy_(total[:, :width, width])


def mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    saved: Tensor,
    scale: float,
    offset: bool,
    segment: int,
    need_input: bool,
    need_params: bool,
) -> tuple[Tensor, ...]:
    """As ``reference.mlp_backward``, from ``saved``; with segment 0 the forward runs again first."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    if not supported("backward", x, hidden_weight):
        flags = (scale, offset, segment, need_input, need_params)
        return mlp_layered.mlp_backward(grad_out, x, *params, saved, *flags)
    layers, width, _ = hidden_weight.shape
    batch = x.shape[0]
    if segment == 0:
        segment = max(2, round(layers**0.5))
        saved = mlp_forward(x, *params, scale, offset, segment)[1]
    weight, bias, saved = hidden_weight.contiguous(), hidden_bias.contiguous(), saved.contiguous()
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in params] if need_params else []
    base = layered.first_state(LINEAR, x.t(), params, scale, offset).base
    state_bytes = width * batch * x.element_size()
    every = segment == 1
    step = max(1, _SCRATCH_BYTES // ((1 if every else 2) * state_bytes * segment)) * segment  # layers a group
    gradient = None
    for first in range((layers - 1) // step * step, -1, -step):
        last = min(first + step, layers)
        count = last - first
        if every:
            h = saved[first:, 0]
        else:
            h = empty(x, count + (last == layers), width, batch)
            args = (h if base is None else base, saved, weight, bias, h, batch, layers, segment, first // segment)
            _run(chain_recompute, "recompute", x, width, offset, args, segments=triton.cdiv(count, segment))
        if gradient is None:
            r, gradient = layered.last_gradient(LINEAR, grad_out, h[count], last_weight, offset)
            if need_params:
                layered.last_gradients(LINEAR, r, h[count], grads)
            parts = gradient.a[None] if gradient.base is None else torch.stack((gradient.moved, gradient.a))
        g = empty(x, count, width, batch) if need_params else h
        result = empty(x, *parts.shape)
        fixed = parts if gradient.base is None else gradient.base
        args = (fixed, weight, h, parts, result, g, batch, layers, first, last)
        _run(chain_backward, "backward", x, width, offset, args, STORE=need_params)
        parts = result
        if need_params:
            _sum_weight_gradients(g, h[:count], grads[2][first:last], grads[3][first:last])
    assert gradient is not None
    full = parts[0] if gradient.base is None else (gradient.base + parts[0]) + parts[1]
    grad_x = layered.first_gradients(LINEAR, full, x.t(), params, grads, scale, offset, need_input)
    return (grad_x, *(grads or [x.new_empty(0) for _ in params]))


def mlp_jvp(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    x_t: Tensor | None,
    first_weight_t: Tensor | None,
    first_bias_t: Tensor | None,
    hidden_weight_t: Tensor | None,
    hidden_bias_t: Tensor | None,
    last_weight_t: Tensor | None,
    last_bias_t: Tensor | None,
    scale: float,
    offset: bool,
) -> Tensor:
    """As ``reference.mlp_jvp``."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    if not supported("jvp", x, hidden_weight):
        first_t, hidden_t = (x_t, first_weight_t, first_bias_t), (hidden_weight_t, hidden_bias_t)
        return mlp_layered.mlp_jvp(x, *params, *first_t, *hidden_t, last_weight_t, last_bias_t, scale, offset)
    layers, width, _ = hidden_weight.shape
    batch = x.shape[0]
    state = layered.first_state(LINEAR, x.t(), params, scale, offset)
    h = state.full(out=torch.empty_like(state.a))
    first_t = (None if x_t is None else x_t.t(), first_weight_t, first_bias_t)
    tangent = layered.first_tangent(LINEAR, x.t(), h, params, first_t, scale, offset)
    final = empty(x, 4 if offset else 2, width, batch)
    weight, bias = hidden_weight.contiguous(), hidden_bias.contiguous()
    args = (
        state.a if state.base is None else state.base,
        state.a,
        tangent.a if tangent.base is None else tangent.base,
        tangent.a,
        weight,
        bias,
        weight if hidden_weight_t is None else hidden_weight_t.contiguous(),
        bias if hidden_bias_t is None else hidden_bias_t.contiguous(),
        final,
        batch,
        layers,
    )
    has = {"HAS_WEIGHT_T": hidden_weight_t is not None, "HAS_BIAS_T": hidden_bias_t is not None}
    _run(chain_jvp, "jvp", x, width, offset, args, **has)
    state = layered.Parts(state.base, final[1 if offset else 0], state.middle, final[0])
    tangent = layered.Parts(tangent.base, final[-1], tangent.middle, final[-2])
    h, full = state.full(out=torch.empty_like(h)), tangent.full(out=torch.empty_like(h))
    return layered.last_tangent(LINEAR, tangent, full, h, params, (last_weight_t, last_bias_t))
