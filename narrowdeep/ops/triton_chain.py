"""The Triton kernels of both chains: all hidden layers in one launch, one program a block of samples.

The first and the last affine layer stay with torch (``ops/layered.py``); the kernels see the L-2 hidden layers. States
are numbered from 0 here (state ``s`` of ``reference.py`` is ``s - 1``), so that hidden layer ``j`` takes state ``j`` to
state ``j + 1``. A state in memory is a matrix (n, positions * B), batch last.

The backward goes down a group of segments at a time: ``chain_recompute`` computes their states from the saved ones,
segments in parallel; ``chain_backward`` follows the gradient G through them; the family's weight gradient kernel sums
G h^T over the batch, layers in parallel. Those sums would cost more than the layer inside the chain, and only the chain
is serial. No float atomics: results are the same from run to run.

TAP is 0 for the MLP, the filter size f for a convolution. There a lane is one position of one sample; a layer's input
goes through scratch memory with a border of zeros, where the neighbouring lanes read it.
"""

# ruff: noqa: RUF005, SIM102 (no starred tuples in the kernel language; a constexpr `if` must stand alone)
from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from narrowdeep.ops import layered
from narrowdeep.ops.reference import saved_shape
from narrowdeep.ops.triton_common import (
    MOVE_PERIOD,
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
    read_moved,
    read_state,
    scratch_bytes,
    write_state,
    zeros_like_state,
)

_LOOSE = ["batch", "layers", "segment", "first", "last"]  # integers that must not make another kernel


@triton.jit
def lanes(
    scratch_ptr,
    batch,
    WIDTH: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(column of the state matrix of every lane, the program's room in scratch memory as ``affine`` takes it)."""
    if TAP == 0:
        column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        room = (scratch_ptr, column, column)
    else:
        POSITIONS: tl.constexpr = HEIGHT * LENGTH
        RADIUS: tl.constexpr = TAP // 2
        lane = tl.arange(0, triton.next_power_of_2(POSITIONS) * BLOCK)
        inside = lane // BLOCK < POSITIONS
        position = tl.minimum(lane // BLOCK, POSITIONS - 1)
        sample = tl.program_id(0).to(tl.int64) * BLOCK + lane % BLOCK
        column = tl.where(inside & (sample < batch), position * batch + sample, batch * POSITIONS)
        row = position // LENGTH + RADIUS
        place = (row * (LENGTH + 2 * RADIUS) + position % LENGTH + RADIUS) * BLOCK + lane % BLOCK
        PLANE: tl.constexpr = (HEIGHT + 2 * RADIUS) * (LENGTH + 2 * RADIUS) * BLOCK
        program = (tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)).to(tl.int64)
        room = (scratch_ptr + program * (2 * WIDTH * PLANE), place, inside)
    return column, room


@triton.jit
def affine(
    weight,
    state,
    START,
    room,
    turn,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """START + W state, or START + W^T state, of a linear layer or a zero-padded correlation.

    ``turn`` alternates between 0 and 1 from call to call: of two halves of scratch memory one is written while some
    lanes still read the other, so that one barrier a call is enough.
    """
    if TAP == 0:
        return product(weight, state, START, WIDTH, ROWS, TRANSPOSED)
    else:
        RADIUS: tl.constexpr = TAP // 2
        PLANE: tl.constexpr = (HEIGHT + 2 * RADIUS) * (LENGTH + 2 * RADIUS) * BLOCK
        scratch = room[0] + turn * (WIDTH * PLANE)
        result = ()
        for i in tl.static_range(WIDTH):
            tl.store(scratch + i * PLANE + room[1], state[i], mask=room[2])
            result = result + (tl.broadcast_to(START[i], state[0].shape),)  # type: ignore[assignment]
        tl.debug_barrier()
        for k in range(WIDTH):
            for t in tl.static_range(TAP * TAP):
                shift = ((t // TAP - RADIUS) * (LENGTH + 2 * RADIUS) + t % TAP - RADIUS) * BLOCK
                value = tl.load(scratch + k * PLANE + room[1] + shift)
                new = ()
                for i in tl.static_range(WIDTH):
                    if TRANSPOSED:
                        factor = tl.load(weight + (k * WIDTH + i) * (TAP * TAP) + TAP * TAP - 1 - t)
                    else:
                        factor = tl.load(weight + (i * WIDTH + k) * (TAP * TAP) + t)
                    new = new + (tl.fma(tl.broadcast_to(factor, value.shape), value, result[i]),)  # type: ignore[assignment]
                result = new
        return result


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
    room,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    STORE: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Take (base, moved, a) from state start to state stop. STORE: write state s to h_ptr[s] for start <= s < stop."""
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    LAYER: tl.constexpr = WIDTH * WIDTH * (TAP * TAP if TAP else 1)
    for chunk in range(start // MOVE_PERIOD, (stop + MOVE_PERIOD - 1) // MOVE_PERIOD):
        low = tl.maximum(chunk * MOVE_PERIOD, start)
        high = tl.minimum(chunk * MOVE_PERIOD + MOVE_PERIOD, stop)
        prefetch(weight_ptr, high * LAYER, layers * LAYER, MOVE_PERIOD * LAYER, PREFETCH)
        prefetch(bias_ptr, high * WIDTH, layers * WIDTH, MOVE_PERIOD * WIDTH, PREFETCH)
        for j in range(low, high):
            h = add_states(base, a, COUNT) if OFFSET else a
            if STORE:
                write_state(h_ptr + j * (WIDTH * batch), h, column, batch, WIDTH, ROWS)
            bias = read_bias(bias_ptr + j * WIDTH, WIDTH, ROWS)
            z = affine(weight_ptr + j * LAYER, h, bias, room, j % 2, WIDTH, ROWS, False, TAP, HEIGHT, LENGTH, BLOCK)
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
    scratch_ptr,
    batch,
    layers,
    segment,
    SAVE: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
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
    LAYER: tl.constexpr = WIDTH * WIDTH * (TAP * TAP if TAP else 1)
    batch = batch.to(tl.int64)
    layers = layers.to(tl.int64)
    segment = segment.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    prefetch(weight_ptr, 0, layers * LAYER, MOVE_PERIOD * LAYER, PREFETCH)
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
            base, moved, a, fixed_ptr, weight_ptr, bias_ptr, saved_ptr, start, stop, layers, column, batch, room,
            MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, SAVE == 1, PREFETCH,
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
    scratch_ptr,
    batch,
    layers,
    segment,
    first,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Program (block, i): the states of segment first + i from the saved one at its start, and the very last state.

    ``h``, (states, n, B), begins with state first * segment.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    LAYER: tl.constexpr = WIDTH * WIDTH * (TAP * TAP if TAP else 1)
    batch = batch.to(tl.int64)
    layers = layers.to(tl.int64)
    segment = segment.to(tl.int64)
    first = first.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    number = first + tl.program_id(1)
    start = number * segment
    stop = tl.minimum(start + segment, layers)
    h_ptr -= first * segment * matrix
    prefetch(weight_ptr, start * LAYER, layers * LAYER, MOVE_PERIOD * LAYER, PREFETCH)
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
        base, moved, a, fixed_ptr, weight_ptr, bias_ptr, h_ptr, start, stop, layers, column, batch, room,
        MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, True, PREFETCH,
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
    scratch_ptr,
    batch,
    layers,
    first,
    last,
    STORE: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
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
    LAYER: tl.constexpr = WIDTH * WIDTH * (TAP * TAP if TAP else 1)
    batch = batch.to(tl.int64)
    layers = layers.to(tl.int64)
    first = first.to(tl.int64)
    last = last.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    h_ptr -= first * matrix
    g_ptr -= (first + 1) * matrix
    prefetch(weight_ptr, tl.maximum(last - MOVE_PERIOD, 0) * LAYER, layers * LAYER, MOVE_PERIOD * LAYER, PREFETCH)
    if OFFSET:
        moved = read_moved(grad_in_ptr, column, batch, MIDDLE, WIDTH, ROWS)
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
        ahead = tl.maximum(low - 1 - MOVE_PERIOD, 0) * LAYER
        prefetch(weight_ptr, ahead, layers * LAYER, MOVE_PERIOD * LAYER, PREFETCH)
        for i in range(0, high - low + 1):
            s = high - i
            full = add_states(base, g, COUNT) if OFFSET else g
            if STORE:
                write_state(g_ptr + s * matrix, full, column, batch, WIDTH, ROWS)
            h = read_state(h_ptr + (s - 1) * matrix, column, batch, WIDTH, ROWS)
            weight = weight_ptr + (s - 1) * LAYER
            grad = affine(
                weight, full, zeros_like_state(g, COUNT), room, s % 2, WIDTH, ROWS, True, TAP, HEIGHT, LENGTH, BLOCK
            )
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
    scratch_ptr,
    batch,
    layers,
    HAS_WEIGHT_T: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """States and tangents together: from (``state``, ``tangent``) to ``final``, (4, n, B): moved and a of the state,
    moved and tau of the tangent; (2, n, B), a and tau, in plain form. ``tangent_fixed`` is D."""
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    LAYER: tl.constexpr = WIDTH * WIDTH * (TAP * TAP if TAP else 1)
    batch = batch.to(tl.int64)
    layers = layers.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    a = read_state(state_ptr, column, batch, WIDTH, ROWS)
    tau = read_state(tangent_ptr, column, batch, WIDTH, ROWS)
    base = read_state(fixed_ptr, column, batch, WIDTH, ROWS) if OFFSET else a
    base_t = read_state(tangent_fixed_ptr, column, batch, WIDTH, ROWS) if OFFSET else tau
    moved = zeros_like_state(a, COUNT)
    moved_t = zeros_like_state(a, COUNT)
    prefetch(weight_ptr, 0, layers * LAYER, MOVE_PERIOD * LAYER, PREFETCH)
    for chunk in range(0, (layers + MOVE_PERIOD - 1) // MOVE_PERIOD):
        low = chunk * MOVE_PERIOD
        high = tl.minimum(low + MOVE_PERIOD, layers)
        prefetch(weight_ptr, high * LAYER, layers * LAYER, MOVE_PERIOD * LAYER, PREFETCH)
        if HAS_WEIGHT_T:
            prefetch(weight_t_ptr, high * LAYER, layers * LAYER, MOVE_PERIOD * LAYER, PREFETCH)
        for j in range(low, high):
            h = add_states(base, a, COUNT) if OFFSET else a
            full = add_states(base_t, tau, COUNT) if OFFSET else tau
            dz = read_bias(bias_t_ptr + j * WIDTH, WIDTH, ROWS) if HAS_BIAS_T else zeros_like_state(tau, COUNT)
            if HAS_WEIGHT_T:
                dz = affine(
                    weight_t_ptr + j * LAYER, h, dz, room, j % 2, WIDTH, ROWS, False, TAP, HEIGHT, LENGTH, BLOCK
                )
            turn = (j + 1) % 2 if HAS_WEIGHT_T else 0
            dz = affine(weight_ptr + j * LAYER, full, dz, room, turn, WIDTH, ROWS, False, TAP, HEIGHT, LENGTH, BLOCK)
            bias = read_bias(bias_ptr + j * WIDTH, WIDTH, ROWS)
            z = affine(weight_ptr + j * LAYER, h, bias, room, 1 - turn, WIDTH, ROWS, False, TAP, HEIGHT, LENGTH, BLOCK)
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


MOST_SEGMENTS = 65_535
"""Of a group: CUDA's limit for the second dimension of a grid."""


@dataclass(frozen=True)
class Family:
    """What the MLP and the convolution chain differ in on a GPU. ``kernel`` is forward, recompute, backward or jvp."""

    layer: layered.Layer
    supported: Callable[[str, Tensor, Tensor], bool]
    """(kernel, x, hidden_weight): the rest runs one layer at a time"""
    blocks: Callable[[str, Tensor, Tensor, bool], list[Block]]
    """(kernel, x, hidden_weight, offset): blocks of samples to choose from, best instruction mix first"""
    constants: Callable[[str, Tensor, Tensor], dict[str, Any]]
    """(kernel, x, hidden_weight): ROWS, TAP, HEIGHT, LENGTH and PREFETCH"""
    sum_weight_gradients: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """(g, h, weight_grad, bias_grad): some layers' (layers, n, *positions, B) to (layers, n, n, ...), (layers, n)"""


def constants(family: Family, kernel: str, x: Tensor, weight: Tensor, offset: bool, block: Block) -> dict[str, Any]:
    """Every constant of a chain kernel but its own."""
    return {
        "MIDDLE": x.shape[1] if offset else -1,
        "WIDTH": weight.shape[1],
        "BLOCK": block.samples,
        "ALIGNED": x.shape[0] % 4 == 0,
    } | family.constants(kernel, x, weight)


def _padded(x: Tensor, weight: Tensor, block: Block, segments: int) -> tuple[int, ...]:
    """Shape of a convolution's scratch memory: two padded states a program."""
    border = weight.shape[-1] // 2 * 2
    plane = (x.shape[2] + border) * (x.shape[3] + border) * block.samples
    return triton.cdiv(x.shape[0], block.samples) * segments, 2, weight.shape[1], plane


def _run(
    family: Family,
    kernel: Any,
    name: str,
    x: Tensor,
    weight: Tensor,
    offset: bool,
    tensors: tuple[Tensor, ...],
    numbers: tuple[int, ...],
    segments: int = 1,
    **more: Any,
) -> None:
    """Launch over the batch (and ``segments``) with the block that fits."""
    batch = x.shape[0]

    def start(block: Block) -> None:
        grid = (triton.cdiv(batch, block.samples), segments)
        scratch = x.new_zeros(_padded(x, weight, block, segments)) if x.dim() == 4 else tensors[0]
        values = constants(family, name, x, weight, offset, block) | more
        launch(kernel, grid, *tensors, scratch, batch, *numbers, num_warps=block.warps, **values)

    key = (name, tuple(x.shape), tuple(weight.shape[1:]), x.dtype, offset, segments)
    choose_block(key, family.blocks(name, x, weight, offset), batch * segments, x.device, start)


def forward(
    family: Family,
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
    """As ``reference.forward``."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    if not family.supported("forward", x, hidden_weight):
        return layered.forward(family.layer, x, *params, scale, offset, segment)
    layers = hidden_weight.shape[0]
    state = layered.first_state(family.layer, x.movedim(0, -1), params, scale, offset)
    shape = state.a.shape
    saved = empty(x, *saved_shape(layers + 2, tuple(shape), offset, segment))
    final = empty(x, 2 if offset else 1, *shape)
    fixed = state.a if state.base is None else state.base
    weight, bias = hidden_weight.contiguous(), hidden_bias.contiguous()
    tensors = (fixed, state.a, weight, bias, saved if segment else final, final)
    numbers = (layers, segment if segment > 1 else layers)
    _run(family, chain_forward, "forward", x, weight, offset, tensors, numbers, SAVE=min(segment, 2))
    state = layered.Parts(state.base, final[-1], state.middle, final[0])
    h = state.full(out=torch.empty_like(state.a))
    return layered.last_output(family.layer, state, h, last_weight, last_bias), saved


@dataclass
class Descent:
    """The backward of a chain, a group of layers at a time from the top; ``full`` is G of the first state at last."""

    family: Family
    x: Tensor
    params: layered.Params
    saved: Tensor
    scale: float
    offset: bool
    segment: int
    step: int
    """Layers a group, a multiple of ``segment``."""
    r: Tensor | None = None
    h_last: Tensor | None = None
    full: Tensor | None = None

    def groups(self, grad_out: Tensor, keep_g: bool) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first, last, h, g): states first .. last-1 and G of first+1 .. last (if ``keep_g``), (layers, n, ...).

        Before the first one, ``r`` and ``h_last`` are what ``layered.last_gradients`` takes.
        """
        family, x, segment, offset = self.family, self.x, self.segment, self.offset
        weight, bias, saved = self.params[2].contiguous(), self.params[3].contiguous(), self.saved.contiguous()
        layers = weight.shape[0]
        base = layered.first_state(family.layer, x.movedim(0, -1), self.params, self.scale, offset).base
        shape = saved.shape[2:]
        gradient = None
        for first in range((layers - 1) // self.step * self.step, -1, -self.step):
            last = min(first + self.step, layers)
            count = last - first
            if segment == 1:
                h = saved[first:, 0]
            else:
                h = empty(x, count + (last == layers), *shape)
                tensors: tuple[Tensor, ...] = (h if base is None else base, saved, weight, bias, h)
                numbers = (layers, segment, first // segment)
                segments = triton.cdiv(count, segment)
                _run(family, chain_recompute, "recompute", x, weight, offset, tensors, numbers, segments)
            if gradient is None:
                self.h_last = h[count]
                self.r, gradient = layered.last_gradient(family.layer, grad_out, h[count], self.params[4], offset)
                parts = gradient.a[None] if gradient.base is None else torch.stack((gradient.moved, gradient.a))
            g = empty(x, count, *shape) if keep_g else h
            result = empty(x, *parts.shape)
            tensors = (parts if gradient.base is None else gradient.base, weight, h, parts, result, g)
            _run(family, chain_backward, "backward", x, weight, offset, tensors, (layers, first, last), STORE=keep_g)
            parts = result
            yield first, last, h[:count], g
        assert gradient is not None
        self.full = parts[0] if gradient.base is None else (gradient.base + parts[0]) + parts[1]


def layers_a_group(state: Tensor, segment: int, device: torch.device) -> int:
    """Layers whose states and gradients fit ``scratch_bytes``, a multiple of ``segment``; ``state`` is one of them."""
    bytes_a_layer = (1 if segment == 1 else 2) * state.numel() * state.element_size()
    return min(MOST_SEGMENTS, max(1, scratch_bytes(device) // (bytes_a_layer * segment))) * segment


def workspace(family: Family, x: Tensor, weight: Tensor, offset: bool, segment: int) -> int | None:
    """Bytes that ``backward`` takes for a group of layers; None where layers run one at a time.

    Only shape, dtype and device of x and of the hidden weights are read; ``segment`` is at least 1.
    """
    if not family.supported("backward", x, weight):
        return None
    layers, width = weight.shape[:2]
    state = x.new_empty(width, *x.shape[2:], x.shape[0], device="meta")
    step = layers_a_group(state, segment, x.device)

    def scratch(kernel: str, segments: int) -> int:
        blocks: list[Block] = []
        choose_block((), family.blocks(kernel, x, weight, offset), x.shape[0] * segments, x.device, blocks.append)
        return math.prod(_padded(x, weight, blocks[0], segments)) if x.dim() == 4 else 0

    def group(count: int, states: int) -> int:
        backward = count * state.numel() + scratch("backward", 1)
        if segment == 1:
            return backward
        return states * state.numel() + max(backward, scratch("recompute", triton.cdiv(count, segment)))

    top = (layers - 1) % step + 1  # the first group has the very last state too
    return max(group(top, top + 1), group(step, step) if layers > step else 0) * x.element_size()


def backward(
    family: Family,
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
    """As ``reference.backward``, from ``saved``; with segment 0 the forward runs again first."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    if not family.supported("backward", x, hidden_weight):
        flags = (scale, offset, segment, need_input, need_params)
        return layered.backward(family.layer, grad_out, x, *params, saved, *flags)
    if segment == 0:
        segment = max(2, round(hidden_weight.shape[0] ** 0.5))
        saved = forward(family, x, *params, scale, offset, segment)[1]
    grads = [torch.empty_like(p, memory_format=torch.contiguous_format) for p in params] if need_params else []
    step = layers_a_group(saved[0, 0], segment, x.device)
    descent = Descent(family, x, params, saved, scale, offset, segment, step)
    for first, last, h, g in descent.groups(grad_out, need_params):
        if need_params:
            family.sum_weight_gradients(g, h, grads[2][first:last], grads[3][first:last])
    assert descent.full is not None
    if need_params:
        assert descent.r is not None
        assert descent.h_last is not None
        layered.last_gradients(family.layer, descent.r, descent.h_last, grads)
    inputs = x.movedim(0, -1)
    grad_x = layered.first_gradients(family.layer, descent.full, inputs, params, grads, scale, offset, need_input)
    return (grad_x, *(grads or [x.new_empty(0) for _ in params]))


def jvp(
    family: Family,
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
    """As ``reference.jvp``."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    last_t = (last_weight_t, last_bias_t)
    if not family.supported("jvp", x, hidden_weight):
        tangents = (x_t, first_weight_t, first_bias_t, hidden_weight_t, hidden_bias_t, *last_t)
        return layered.jvp(family.layer, x, *params, *tangents, scale, offset)
    inputs = x.movedim(0, -1)
    state = layered.first_state(family.layer, inputs, params, scale, offset)
    h = state.full(out=torch.empty_like(state.a))
    first_t = (None if x_t is None else x_t.movedim(0, -1), first_weight_t, first_bias_t)
    tangent = layered.first_tangent(family.layer, inputs, h, params, first_t, scale, offset)
    final = empty(x, 4 if offset else 2, *h.shape)
    weight, bias = hidden_weight.contiguous(), hidden_bias.contiguous()
    tensors = (
        state.a if state.base is None else state.base,
        state.a,
        tangent.a if tangent.base is None else tangent.base,
        tangent.a,
        weight,
        bias,
        weight if hidden_weight_t is None else hidden_weight_t.contiguous(),
        bias if hidden_bias_t is None else hidden_bias_t.contiguous(),
        final,
    )
    has = {"HAS_WEIGHT_T": hidden_weight_t is not None, "HAS_BIAS_T": hidden_bias_t is not None}
    _run(family, chain_jvp, "jvp", x, weight, offset, tensors, (hidden_weight.shape[0],), **has)
    state = layered.Parts(state.base, final[1 if offset else 0], state.middle, final[0])
    tangent = layered.Parts(tangent.base, final[-1], tangent.middle, final[-2])
    h, full = state.full(out=torch.empty_like(h)), tangent.full(out=torch.empty_like(h))
    return layered.last_tangent(family.layer, tangent, full, h, params, last_t)
