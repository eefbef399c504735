"""The Triton kernels of both chains: all hidden layers of a span in one launch, one program a block of samples.

Symbols as in ``narrowdeep.ops.reference``, arguments as in ``narrowdeep.ops.chain``. A span that begins with the first
layer or ends with the last leaves those to torch (``ops/layered.py``): the kernels take states to states. A word of a
state in memory is a matrix (n, positions * B), batch last. Where a state is renormalised is all that depends on its
absolute number: kernels take ``phase``, the number of the span's first state modulo RENORMALISE_PERIOD, and count from
there.

The backward goes down a group of segments at a time: ``chain_recompute`` computes their states from the saved ones,
segments in parallel; ``chain_backward`` follows G through them; the family's weight gradient kernel sums
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
from narrowdeep.ops.reference import RENORMALISE_PERIOD as _PERIOD
from narrowdeep.ops.reference import saved_shape
from narrowdeep.ops.triton_common import (
    RENORMALISE_PERIOD,
    Block,
    add_skip,
    add_states,
    choose_block,
    clip,
    empty,
    enter,
    launch,
    leave,
    mask_gradient,
    prefetch,
    product,
    read_bias,
    read_state,
    renormalise,
    scratch_bytes,
    write_state,
    zeros_like_state,
)

_LOOSE = ["batch", "layers", "segment", "phase", "first", "last", "given", "masked"]
"""Integers that must not make another kernel."""


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
    total,
    hi,
    lo,
    base_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    start,
    stop,
    end,
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
    """Take (total, hi, lo) from state start to state stop, with total = base + hi. Layer ``end`` - 1 is the last.

    STORE: write state s to h_ptr[s] for start <= s < stop.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    LAYER: tl.constexpr = WIDTH * WIDTH * (TAP * TAP if TAP else 1)
    for chunk in range(start // RENORMALISE_PERIOD, (stop + RENORMALISE_PERIOD - 1) // RENORMALISE_PERIOD):
        low = tl.maximum(chunk * RENORMALISE_PERIOD, start)
        high = tl.minimum(chunk * RENORMALISE_PERIOD + RENORMALISE_PERIOD, stop)
        prefetch(weight_ptr, high * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        prefetch(bias_ptr, high * WIDTH, end * WIDTH, RENORMALISE_PERIOD * WIDTH, PREFETCH)
        for j in range(low, high):
            h = add_states(total, lo, COUNT) if OFFSET else lo
            if STORE:
                write_state(h_ptr + j * (WIDTH * batch), h, column, batch, WIDTH, ROWS)
            bias = read_bias(bias_ptr + j * WIDTH, WIDTH, ROWS)
            z = affine(weight_ptr + j * LAYER, h, bias, room, j % 2, WIDTH, ROWS, False, TAP, HEIGHT, LENGTH, BLOCK)
            if OFFSET:
                z = add_skip(z, lo, MIDDLE, COUNT, ROWS)
            lo = clip(z, total, OFFSET, COUNT)
        if OFFSET:
            if high % RENORMALISE_PERIOD == 0:
                total, hi, lo = renormalise(base_ptr, total, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
    return total, hi, lo


@triton.jit(do_not_specialize=_LOOSE)
def chain_forward(
    base_ptr,
    hi_ptr,
    lo_ptr,
    weight_ptr,
    bias_ptr,
    saved_ptr,
    final_ptr,
    scratch_ptr,
    batch,
    layers,
    segment,
    phase,
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
    """The state (base, hi, lo), each (n, B), to ``final`` after all layers, (3, n, B). In plain form lo and (1, n, B).

    SAVE 0: nothing, 1: every h, 2: every ``segment``-th state, as ``reference.saved_shape`` says of a whole network.
    MIDDLE is the number of the middle unit in offset form, -1 in plain form.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    LAYER: tl.constexpr = WIDTH * WIDTH * (TAP * TAP if TAP else 1)
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    segment = segment.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    weight_ptr -= phase * LAYER
    bias_ptr -= phase * WIDTH
    prefetch(weight_ptr, phase * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
    prefetch(bias_ptr, phase * WIDTH, end * WIDTH, RENORMALISE_PERIOD * WIDTH, PREFETCH)
    lo = read_state(lo_ptr, column, batch, WIDTH, ROWS)
    if OFFSET:
        total, hi = enter(base_ptr, hi_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    else:
        total = lo
        hi = lo
    if SAVE == 1:
        saved_ptr -= phase * matrix
    for start in range(phase, end, segment):
        stop = tl.minimum(start + segment, end)
        if SAVE == 2:
            if OFFSET:
                write_state(saved_ptr, hi, column, batch, WIDTH, ROWS)
                saved_ptr += matrix
            write_state(saved_ptr, lo, column, batch, WIDTH, ROWS)
            saved_ptr += matrix
        total, hi, lo = _advance(
            total, hi, lo, base_ptr, weight_ptr, bias_ptr, saved_ptr, start, stop, end, column, batch, room,
            MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, SAVE == 1, PREFETCH,
        )  # fmt: skip
    if SAVE == 1:
        h = add_states(total, lo, COUNT) if OFFSET else lo
        write_state(saved_ptr + end * matrix, h, column, batch, WIDTH, ROWS)
    leave(final_ptr, base_ptr, hi_ptr, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)


@triton.jit(do_not_specialize=_LOOSE)
def chain_recompute(
    base_ptr,
    given_ptr,
    saved_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    scratch_ptr,
    batch,
    layers,
    segment,
    phase,
    first,
    given,
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
    """Program (block, i): the states of segment first + i from the one at its start, and the very last state.

    Segment s starts from row s of ``saved``, (hi, lo), or lo in plain form; where ``given`` is 1 segment 0 starts from
    such a row at ``given_ptr`` and the others from row s - 1. ``h``, (states, n, B), begins with state first * segment.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    LAYER: tl.constexpr = WIDTH * WIDTH * (TAP * TAP if TAP else 1)
    WORDS: tl.constexpr = 2 if OFFSET else 1
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    segment = segment.to(tl.int64)
    first = first.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    number = first + tl.program_id(1)
    start = phase + number * segment
    stop = tl.minimum(start + segment, end)
    h_ptr -= (phase + first * segment) * matrix
    weight_ptr -= phase * LAYER
    bias_ptr -= phase * WIDTH
    prefetch(weight_ptr, start * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
    row_ptr = saved_ptr + (number - given) * (WORDS * matrix)
    if number < given:
        row_ptr = given_ptr
    lo = read_state(row_ptr + (WORDS - 1) * matrix, column, batch, WIDTH, ROWS)
    if OFFSET:
        total, hi = enter(base_ptr, row_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    else:
        total = lo
        hi = lo
    total, hi, lo = _advance(
        total, hi, lo, base_ptr, weight_ptr, bias_ptr, h_ptr, start, stop, end, column, batch, room,
        MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, True, PREFETCH,
    )  # fmt: skip
    if stop == end:
        h = add_states(total, lo, COUNT) if OFFSET else lo
        write_state(h_ptr + end * matrix, h, column, batch, WIDTH, ROWS)


@triton.jit(do_not_specialize=_LOOSE)
def chain_backward(
    base_ptr,
    hi_ptr,
    lo_ptr,
    weight_ptr,
    h_ptr,
    result_ptr,
    g_ptr,
    scratch_ptr,
    batch,
    layers,
    phase,
    first,
    last,
    masked,
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

    (base, hi, lo), each (n, B), is G of state ``last`` (``masked`` 0: it has still to pass the ReLU of that state), and
    ``result``, (3, n, B), that of state ``first``; lo and (1, n, B) in plain form. ``h``, (states, n, B), begins with
    state first.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    LAYER: tl.constexpr = WIDTH * WIDTH * (TAP * TAP if TAP else 1)
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    first = first.to(tl.int64) + phase
    last = last.to(tl.int64) + phase
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    h_ptr -= first * matrix
    g_ptr -= (first + 1) * matrix
    weight_ptr -= phase * LAYER
    ahead = tl.maximum(last - RENORMALISE_PERIOD, phase) * LAYER
    prefetch(weight_ptr, ahead, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
    lo = read_state(lo_ptr, column, batch, WIDTH, ROWS)
    if OFFSET:
        total, hi = enter(base_ptr, hi_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    else:
        total = lo
        hi = lo
    if masked == 0:
        h = read_state(h_ptr + last * matrix, column, batch, WIDTH, ROWS)
        lo = mask_gradient(h, lo, total, OFFSET, COUNT)
    for down in range(0, last // RENORMALISE_PERIOD - (first + 1) // RENORMALISE_PERIOD + 1):
        chunk = last // RENORMALISE_PERIOD - down
        low = tl.maximum(chunk * RENORMALISE_PERIOD, first + 1)
        high = tl.minimum(chunk * RENORMALISE_PERIOD + RENORMALISE_PERIOD - 1, last)
        ahead = tl.maximum(low - 1 - RENORMALISE_PERIOD, phase) * LAYER
        prefetch(weight_ptr, ahead, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        for i in range(0, high - low + 1):
            s = high - i
            full = add_states(total, lo, COUNT) if OFFSET else lo
            if STORE:
                write_state(g_ptr + s * matrix, full, column, batch, WIDTH, ROWS)
            h = read_state(h_ptr + (s - 1) * matrix, column, batch, WIDTH, ROWS)
            weight = weight_ptr + (s - 1) * LAYER
            grad = affine(
                weight, full, zeros_like_state(lo, COUNT), room, s % 2, WIDTH, ROWS, True, TAP, HEIGHT, LENGTH, BLOCK
            )
            if OFFSET:
                grad = add_skip(grad, lo, MIDDLE, COUNT, ROWS)
            lo = mask_gradient(h, grad, total, OFFSET, COUNT)
        if OFFSET:
            if low % RENORMALISE_PERIOD == 0:
                total, hi, lo = renormalise(base_ptr, total, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
    leave(result_ptr, base_ptr, hi_ptr, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)


@triton.jit(do_not_specialize=_LOOSE)
def chain_jvp(
    base_ptr,
    hi_ptr,
    lo_ptr,
    base_t_ptr,
    hi_t_ptr,
    lo_t_ptr,
    weight_ptr,
    bias_ptr,
    weight_t_ptr,
    bias_t_ptr,
    h_ptr,
    final_ptr,
    scratch_ptr,
    batch,
    layers,
    phase,
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
    """A state (base, hi, lo) and its tangent (base_t, hi_t, lo_t) through all layers; lo and lo_t in plain form.

    Writes the value of the last state to ``h``, (n, B), and its tangent to ``final``, (3, n, B) or (1, n, B).
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = (WIDTH + ROWS - 1) // ROWS
    LAYER: tl.constexpr = WIDTH * WIDTH * (TAP * TAP if TAP else 1)
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    batch *= HEIGHT * LENGTH
    weight_ptr -= phase * LAYER
    bias_ptr -= phase * WIDTH
    weight_t_ptr -= phase * LAYER
    bias_t_ptr -= phase * WIDTH
    lo = read_state(lo_ptr, column, batch, WIDTH, ROWS)
    lo_t = read_state(lo_t_ptr, column, batch, WIDTH, ROWS)
    if OFFSET:
        total, hi = enter(base_ptr, hi_ptr, column, batch, MIDDLE, WIDTH, ROWS)
        total_t, hi_t = enter(base_t_ptr, hi_t_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    else:
        total = lo
        hi = lo
        total_t = lo_t
        hi_t = lo_t
    prefetch(weight_ptr, phase * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
    for chunk in range(0, (end + RENORMALISE_PERIOD - 1) // RENORMALISE_PERIOD):
        low = tl.maximum(chunk * RENORMALISE_PERIOD, phase)
        high = tl.minimum(chunk * RENORMALISE_PERIOD + RENORMALISE_PERIOD, end)
        prefetch(weight_ptr, high * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        if HAS_WEIGHT_T:
            prefetch(weight_t_ptr, high * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        for j in range(low, high):
            h = add_states(total, lo, COUNT) if OFFSET else lo
            full = add_states(total_t, lo_t, COUNT) if OFFSET else lo_t
            dz = read_bias(bias_t_ptr + j * WIDTH, WIDTH, ROWS) if HAS_BIAS_T else zeros_like_state(lo_t, COUNT)
            if HAS_WEIGHT_T:
                dz = affine(
                    weight_t_ptr + j * LAYER, h, dz, room, j % 2, WIDTH, ROWS, False, TAP, HEIGHT, LENGTH, BLOCK
                )
            turn = (j + 1) % 2 if HAS_WEIGHT_T else 0
            dz = affine(weight_ptr + j * LAYER, full, dz, room, turn, WIDTH, ROWS, False, TAP, HEIGHT, LENGTH, BLOCK)
            bias = read_bias(bias_ptr + j * WIDTH, WIDTH, ROWS)
            z = affine(weight_ptr + j * LAYER, h, bias, room, 1 - turn, WIDTH, ROWS, False, TAP, HEIGHT, LENGTH, BLOCK)
            if OFFSET:
                dz = add_skip(dz, lo_t, MIDDLE, COUNT, ROWS)
                z = add_skip(z, lo, MIDDLE, COUNT, ROWS)
            lo = clip(z, total, OFFSET, COUNT)
            lo_t = mask_gradient(add_states(total, lo, COUNT) if OFFSET else lo, dz, total_t, OFFSET, COUNT)
        if OFFSET:
            if high % RENORMALISE_PERIOD == 0:
                total, hi, lo = renormalise(base_ptr, total, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
                total_t, hi_t, lo_t = renormalise(base_t_ptr, total_t, hi_t, lo_t, column, batch, MIDDLE, WIDTH, ROWS)
    h = add_states(total, lo, COUNT) if OFFSET else lo
    write_state(h_ptr, h, column, batch, WIDTH, ROWS)
    leave(final_ptr, base_t_ptr, hi_t_ptr, hi_t, lo_t, column, batch, MIDDLE, WIDTH, ROWS)


MOST_SEGMENTS = 65_535
"""Of a group: CUDA's limit for the second dimension of a grid."""


@dataclass(frozen=True)
class Family:
    """What the MLP and the convolution chain differ in on a GPU. ``kernel`` is forward, recompute, backward or jvp.

    ``x`` stands for the samples of a call: (B, any, *positions), of which shape, dtype and device are read.
    """

    layer: layered.Layer
    supported: Callable[[str, Tensor, Tensor], bool]
    """(kernel, x, hidden_weight): the rest runs one layer at a time"""
    blocks: Callable[[str, Tensor, Tensor, bool], list[Block]]
    """(kernel, x, hidden_weight, offset): blocks of samples to choose from, best instruction mix first"""
    constants: Callable[[str, Tensor, Tensor], dict[str, Any]]
    """(kernel, x, hidden_weight): ROWS, TAP, HEIGHT, LENGTH and PREFETCH"""
    sum_weight_gradients: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """(g, h, weight_grad, bias_grad): some layers' (layers, n, *positions, B) to (layers, n, n, ...), (layers, n)"""


def constants(family: Family, kernel: str, x: Tensor, weight: Tensor, middle: int, block: Block) -> dict[str, Any]:
    """Every constant of a chain kernel but its own; ``middle`` is -1 in plain form."""
    return {
        "MIDDLE": middle,
        "WIDTH": weight.shape[1],
        "BLOCK": block.samples,
        "ALIGNED": x.shape[0] % 4 == 0,
    } | family.constants(kernel, x, weight)


def _padded(x: Tensor, weight: Tensor, block: Block, segments: int) -> tuple[int, ...]:
    """Shape of a convolution's scratch memory: two padded states a program."""
    border = weight.shape[-1] // 2 * 2
    plane = (x.shape[2] + border) * (x.shape[3] + border) * block.samples
    return triton.cdiv(x.shape[0], block.samples) * segments, 2, weight.shape[1], plane


@dataclass(frozen=True)
class Span:
    """What every kernel of a call needs; ``hidden`` are the contiguous hidden weights and biases."""

    family: Family
    x: Tensor
    """As ``Family`` takes it."""
    hidden: tuple[Tensor, Tensor]
    middle: int
    """Number of the middle unit, -1 in plain form."""
    phase: int
    """Number of the first state, modulo RENORMALISE_PERIOD."""

    @property
    def layers(self) -> int:
        return self.hidden[0].shape[0]

    @property
    def words(self) -> int:
        """Of a state: base, hi and lo, or lo alone in plain form."""
        return 1 if self.middle < 0 else 3

    def run(
        self,
        kernel: Any,
        name: str,
        tensors: tuple[Tensor, ...],
        numbers: tuple[int, ...],
        segments: int = 1,
        **more: Any,
    ) -> None:
        """Launch over the batch (and ``segments``) with the block that fits."""
        x, weight, offset = self.x, self.hidden[0], self.middle >= 0
        batch = x.shape[0]

        def start(block: Block) -> None:
            grid = (triton.cdiv(batch, block.samples), segments)
            scratch = x.new_zeros(_padded(x, weight, block, segments)) if x.dim() == 4 else tensors[0]
            values = constants(self.family, name, x, weight, self.middle, block) | more
            warps: dict[str, Any] = {"num_warps": block.warps, "registers": block.registers}
            launch(kernel, grid, *tensors, scratch, batch, *numbers, **warps, **values)

        key = (name, tuple(x.shape), tuple(weight.shape[1:]), x.dtype, offset, segments)
        choose_block(key, self.family.blocks(name, x, weight, offset), batch * segments, x.device, start)


def samples(input: Tensor, first_weight: Tensor | None) -> Tensor:
    """The input of a span as ``Family`` takes it: x, or a state with the batch first."""
    return input if first_weight is not None else input[0].movedim(-1, 0)


def span(family: Family, input: Tensor, params: layered.Params, offset: bool, outputs: int, start: int) -> Span:
    """Of a call."""
    weight, bias = params[2], params[3]
    middle = weight.shape[1] - outputs - 1 if offset else -1
    return Span(family, samples(input, params[0]), (weight.contiguous(), bias.contiguous()), middle, start % _PERIOD)


def words(state: Tensor | layered.HiLo) -> tuple[Tensor, Tensor, Tensor]:
    """(base, hi, lo) of a state, a gradient or a tangent; three times lo in plain form."""
    if isinstance(state, Tensor):
        state = state.contiguous()
        return state[0], state[len(state) // 2], state[-1]
    if state.base is None:
        return state.lo, state.lo, state.lo
    return state.base, state.hi, state.lo


def forward(
    family: Family,
    input: Tensor,
    first_weight: Tensor | None,
    first_bias: Tensor | None,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor | None,
    last_bias: Tensor | None,
    scale: float,
    offset: bool,
    outputs: int,
    start: int,
    segment: int,
) -> tuple[Tensor, Tensor]:
    """(output, saved) of a span, see ``narrowdeep.ops.chain``."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    if not family.supported("forward", samples(input, first_weight), hidden_weight):
        return layered.forward(family.layer, input, *params, scale, offset, outputs, start, segment)
    these = span(family, input, params, offset, outputs, start)
    layers = these.layers
    if first_weight is None or first_bias is None:
        base, hi, lo = words(input)
    else:
        x = input.movedim(0, -1)
        base, hi, lo = words(layered.first_state(family.layer, x, first_weight, first_bias, outputs, scale, offset))
    # A kernel saves the states at both ends, too: one more row is cheaper than a question in every layer.
    saved = empty(lo, *saved_shape(layers, tuple(lo.shape), offset, segment))
    final = empty(lo, these.words, *lo.shape)
    tensors = (base, hi, lo, *these.hidden, saved if segment else final, final)
    numbers = (layers, segment if segment > 1 else layers, these.phase)
    these.run(chain_forward, "forward", tensors, numbers, SAVE=min(segment, 2))
    low = 1 if first_weight is None and segment else 0
    high = saved.shape[0] - (segment == 1 and last_weight is None)
    saved = saved[low:high]
    if last_weight is None or last_bias is None:
        return final, saved
    state = layered.HiLo(base if offset else None, final[-1], these.middle, final[1] if offset else None)
    h = state.full(out=torch.empty_like(lo))
    return layered.last_output(family.layer, state, h, last_weight, last_bias), saved


@dataclass
class Descent:
    """The backward of a span, a group of layers at a time from the top; ``gradient`` is G of the first state at last.

    Arguments as in ``narrowdeep.ops.chain``, ``segment`` at least 1.
    """

    family: Family
    input: Tensor
    params: layered.Params
    saved: Tensor
    scale: float
    offset: bool
    outputs: int
    start: int
    segment: int
    step: int
    """Layers a group, a multiple of ``segment``."""
    r: Tensor | None = None
    h_last: Tensor | None = None
    gradient: Tensor | None = None
    """(3, n, *positions, B), in plain form (1, n, *positions, B)."""

    def groups(self, grad: Tensor, keep_g: bool) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first, last, h, g): states first .. last-1 and G of first+1 .. last (if ``keep_g``), (layers, n, ...).

        Before the first one, ``r`` and ``h_last`` are what ``layered.last_gradients`` takes, if there is a last layer.
        """
        segment, offset, last_weight = self.segment, self.offset, self.params[4]
        these = span(self.family, self.input, self.params, offset, self.outputs, self.start)
        saved, layers = self.saved.contiguous(), these.layers
        given = int(self.params[0] is None)
        if given:
            state = self.input.contiguous()
            base, row = state[0], state[-2:] if offset else state
        else:
            x, width = self.input.movedim(0, -1), self.params[2].shape[1]
            base = layered.base_of(x, width, self.outputs, self.scale) if offset else saved
            row = saved
        shape = saved.shape[2:]
        for first in range((layers - 1) // self.step * self.step, -1, -self.step):
            last = min(first + self.step, layers)
            count = last - first
            if segment > 1:
                h = empty(saved, count + (last == layers), *shape)
                tensors: tuple[Tensor, ...] = (base, row, saved, *these.hidden, h)
                numbers: tuple[int, ...] = (layers, segment, these.phase, first // segment, given)
                these.run(chain_recompute, "recompute", tensors, numbers, segments=triton.cdiv(count, segment))
            elif given and first == 0:  # the state that came in was not saved again
                before_last = count if last_weight is not None and last == layers else count - 1
                h = torch.cat((((base + row[0]) + row[1])[None] if offset else row, saved[:before_last, 0]))
            else:
                h = saved[first - given :, 0]
            masked = last < layers or last_weight is None
            if self.gradient is not None:
                before = words(self.gradient)
            elif last_weight is None:
                before = words(grad)
            else:
                self.h_last = h[count]
                self.r, top = layered.last_gradient(self.family.layer, grad, h[count], last_weight, offset)
                before = words(top)
            g = empty(saved, count, *shape) if keep_g else h
            self.gradient = empty(saved, these.words, *shape)
            tensors = (*before, these.hidden[0], h, self.gradient, g)
            numbers = (layers, these.phase, first, last, int(masked))
            these.run(chain_backward, "backward", tensors, numbers, STORE=keep_g)
            yield first, last, h[:count], g

    def full(self) -> Tensor:
        """G of the first state as one value."""
        assert self.gradient is not None
        g = self.gradient
        return (g[0] + g[1]) + g[2] if self.offset else g[0]


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
    grad: Tensor,
    input: Tensor,
    first_weight: Tensor | None,
    first_bias: Tensor | None,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor | None,
    last_bias: Tensor | None,
    saved: Tensor,
    scale: float,
    offset: bool,
    outputs: int,
    start: int,
    segment: int,
    need_input: bool,
    need_params: bool,
) -> tuple[Tensor, ...]:
    """Gradients of the input and the six parameters of a span; with segment 0 the forward runs again first."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    settings = (scale, offset, outputs, start)
    if not family.supported("backward", samples(input, first_weight), hidden_weight):
        flags = (segment, need_input, need_params)
        return layered.backward(family.layer, grad, input, *params, saved, *settings, *flags)
    if segment == 0:
        segment = max(2, round(hidden_weight.shape[0] ** 0.5))
        saved = forward(family, input, *params, *settings, segment)[1]
    grads = [input.new_empty(0 if p is None or not need_params else p.shape) for p in params]
    step = layers_a_group(input.new_empty(saved.shape[2:], device="meta"), segment, input.device)
    descent = Descent(family, input, params, saved, *settings, segment, step)
    for first, last, h, g in descent.groups(grad, need_params):
        if need_params:
            family.sum_weight_gradients(g, h, grads[2][first:last], grads[3][first:last])
    if need_params and last_weight is not None:
        assert descent.r is not None
        assert descent.h_last is not None
        layered.last_gradients(family.layer, descent.r, descent.h_last, grads[4:])
    if first_weight is None:
        assert descent.gradient is not None
        return descent.gradient if need_input else input.new_empty(0), *grads
    ends = grads[:2] if need_params else []
    x = input.movedim(0, -1)
    full = descent.full()
    return layered.first_gradients(family.layer, full, x, first_weight, ends, scale, offset, need_input), *grads


def jvp(
    family: Family,
    input: Tensor,
    first_weight: Tensor | None,
    first_bias: Tensor | None,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor | None,
    last_bias: Tensor | None,
    input_t: Tensor | None,
    first_weight_t: Tensor | None,
    first_bias_t: Tensor | None,
    hidden_weight_t: Tensor | None,
    hidden_bias_t: Tensor | None,
    last_weight_t: Tensor | None,
    last_bias_t: Tensor | None,
    scale: float,
    offset: bool,
    outputs: int,
    start: int,
) -> Tensor:
    """The tangent of a span's output."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    last_t = (last_weight_t, last_bias_t)
    if not family.supported("jvp", samples(input, first_weight), hidden_weight):
        tangents = (input_t, first_weight_t, first_bias_t, hidden_weight_t, hidden_bias_t, *last_t)
        return layered.jvp(family.layer, input, *params, *tangents, scale, offset, outputs, start)
    these = span(family, input, params, offset, outputs, start)
    if first_weight is None or first_bias is None:
        state, tangent = words(input), words(torch.zeros_like(input) if input_t is None else input_t)
    else:
        x = input.movedim(0, -1)
        before = layered.first_state(family.layer, x, first_weight, first_bias, outputs, scale, offset)
        first_t = (None if input_t is None else input_t.movedim(0, -1), first_weight_t, first_bias_t)
        value = before.full(out=torch.empty_like(before.lo))
        ends = (first_weight, outputs, first_t, scale, offset)
        state, tangent = words(before), words(layered.first_tangent(family.layer, x, value, *ends))
    weight, bias = these.hidden
    h = empty(state[2], *state[2].shape)
    final = empty(h, these.words, *h.shape)
    tensors = (
        *state,
        *tangent,
        weight,
        bias,
        weight if hidden_weight_t is None else hidden_weight_t.contiguous(),
        bias if hidden_bias_t is None else hidden_bias_t.contiguous(),
        h,
        final,
    )
    has = {"HAS_WEIGHT_T": hidden_weight_t is not None, "HAS_BIAS_T": hidden_bias_t is not None}
    these.run(chain_jvp, "jvp", tensors, (these.layers, these.phase), **has)
    if last_weight is None:
        return final
    after = layered.HiLo(tangent[0] if offset else None, final[-1], these.middle, final[1] if offset else None)
    full = after.full(out=torch.empty_like(h))
    return layered.last_tangent(family.layer, after, full, h, last_weight, last_t)
