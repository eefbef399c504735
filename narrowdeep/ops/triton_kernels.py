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
"""

# ruff: noqa: SIM102 (a constexpr `if` must stand alone)
from __future__ import annotations

import triton
import triton.language as tl

from narrowdeep.ops.triton_affine import affine, lanes
from narrowdeep.ops.triton_common import (
    FRAGMENT,
    RENORMALISE_PERIOD,
    add_skip,
    add_states,
    clip,
    enter,
    entry_count,
    leave,
    mask_gradient,
    prefetch,
    read_bias,
    read_near,
    read_state,
    renormalise,
    write_state,
    zeros_like_state,
)
from narrowdeep.ops.triton_packed import (
    is_packed,
    layer_size,
    next_record,
    packed_product,
    read_ahead,
    record_bias,
    spare_layers,
)
from narrowdeep.ops.triton_sums import sums_size, warp_sums, write_sums

LOOSE = ["batch", "layers", "segment", "phase", "first", "last", "given", "masked", "count"]
"""Integers that must not make another kernel."""


@triton.jit
def advance(
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
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Take (total, hi, lo) from state start to state stop, with total = base + hi. Layer ``end`` - 1 is the last.

    STORE: write state s to h_ptr[s] for start <= s < stop.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = len(lo)
    LAYER: tl.constexpr = layer_size(WIDTH, ROWS, TAP, len(room) == 0)
    PACKED: tl.constexpr = is_packed(ROWS, TAP)
    LANES: tl.constexpr = lo[0].shape[0]
    if PACKED:
        ahead = read_ahead(weight_ptr + start * LAYER, LAYER, WIDTH, ROWS, True, AHEAD, LANES)
    for chunk in range(start // RENORMALISE_PERIOD, (stop + RENORMALISE_PERIOD - 1) // RENORMALISE_PERIOD):
        low = tl.maximum(chunk * RENORMALISE_PERIOD, start)
        high = tl.minimum(chunk * RENORMALISE_PERIOD + RENORMALISE_PERIOD, stop)
        prefetch(weight_ptr, high * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        prefetch(bias_ptr, high * WIDTH, end * WIDTH, RENORMALISE_PERIOD * WIDTH, PREFETCH and not PACKED)
        for j in tl.range(low, high, loop_unroll_factor=2 * AHEAD if AHEAD else 1):
            h = add_states(total, lo, COUNT) if OFFSET else lo
            if STORE:
                write_state(h_ptr + j * (WIDTH * batch), h, column, batch, WIDTH, ROWS)
            if PACKED:
                weight = weight_ptr + (j + AHEAD) * LAYER
                record, ahead = next_record(ahead, weight, WIDTH, ROWS, True, AHEAD, LANES)
                z = packed_product(record, h, record_bias(record, WIDTH, ROWS), WIDTH, ROWS, False)
            else:
                bias = read_bias(bias_ptr + j * WIDTH, WIDTH, ROWS)
                z = affine(weight_ptr + j * LAYER, h, bias, room, j % 2, WIDTH, ROWS, False, TAP, HEIGHT, LENGTH, BLOCK)
            if OFFSET:
                z = add_skip(z, lo, MIDDLE, COUNT, ROWS, len(column[0]))
            lo = clip(z, total, OFFSET, COUNT)
        if OFFSET:
            if high % RENORMALISE_PERIOD == 0:
                total, hi, lo = renormalise(base_ptr, total, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
    return total, hi, lo


@triton.jit(do_not_specialize=LOOSE)
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
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """The state (base, hi, lo), each (n, B), to ``final`` after all layers, (3, n, B). In plain form lo and (1, n, B).

    SAVE 0: nothing, 1: every h, 2: every ``segment``-th state, as ``reference.saved_shape`` says of a whole network.
    MIDDLE is the number of the middle unit in offset form, -1 in plain form.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    segment = segment.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK, ROWS)
    COUNT: tl.constexpr = entry_count(WIDTH, ROWS) * len(column[0])
    LAYER: tl.constexpr = layer_size(WIDTH, ROWS, TAP, len(room) == 0)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    weight_ptr += (spare_layers(ROWS, TAP) - phase) * LAYER
    bias_ptr -= phase * WIDTH
    prefetch(weight_ptr, phase * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
    prefetch(bias_ptr, phase * WIDTH, end * WIDTH, RENORMALISE_PERIOD * WIDTH, PREFETCH and not is_packed(ROWS, TAP))
    total, hi, lo = enter(base_ptr, hi_ptr, lo_ptr, column, batch, MIDDLE, WIDTH, ROWS)
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
        total, hi, lo = advance(
            total, hi, lo, base_ptr, weight_ptr, bias_ptr, saved_ptr, start, stop, end, column, batch, room,
            MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, SAVE == 1, AHEAD, PREFETCH,
        )  # fmt: skip
    if SAVE == 1:
        h = add_states(total, lo, COUNT) if OFFSET else lo
        write_state(saved_ptr + end * matrix, h, column, batch, WIDTH, ROWS)
    leave(final_ptr, base_ptr, hi_ptr, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)


@triton.jit(do_not_specialize=LOOSE)
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
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Program (block, i): the states of segment first + i from the one at its start, and the very last state.

    Segment s starts from row s of ``saved``, (hi, lo), or lo in plain form; where ``given`` is 1 segment 0 starts from
    such a row at ``given_ptr`` and the others from row s - 1. ``h``, (states, n, B), begins with state first * segment.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    WORDS: tl.constexpr = 2 if OFFSET else 1
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    segment = segment.to(tl.int64)
    first = first.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK, ROWS)
    COUNT: tl.constexpr = entry_count(WIDTH, ROWS) * len(column[0])
    LAYER: tl.constexpr = layer_size(WIDTH, ROWS, TAP, len(room) == 0)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    number = first + tl.program_id(1)
    start = phase + number * segment
    stop = tl.minimum(start + segment, end)
    h_ptr -= (phase + first * segment) * matrix
    weight_ptr += (spare_layers(ROWS, TAP) - phase) * LAYER
    bias_ptr -= phase * WIDTH
    prefetch(weight_ptr, start * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
    row_ptr = saved_ptr + (number - given) * (WORDS * matrix)
    if number < given:
        row_ptr = given_ptr
    total, hi, lo = enter(base_ptr, row_ptr, row_ptr + (WORDS - 1) * matrix, column, batch, MIDDLE, WIDTH, ROWS)
    total, hi, lo = advance(
        total, hi, lo, base_ptr, weight_ptr, bias_ptr, h_ptr, start, stop, end, column, batch, room,
        MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, True, AHEAD, PREFETCH,
    )  # fmt: skip
    if stop == end:
        h = add_states(total, lo, COUNT) if OFFSET else lo
        write_state(h_ptr + end * matrix, h, column, batch, WIDTH, ROWS)


@triton.jit
def go_back(
    total,
    hi,
    lo,
    base_ptr,
    weight_ptr,
    h_ptr,
    g_ptr,
    first,
    last,
    phase,
    end,
    column,
    batch,
    room,
    STORE: tl.constexpr,
    SUM: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Take G = (total, hi, lo) from state last to state first, with total = base + hi, past the ReLU of state last.

    STORE: write G of state s to g_ptr[s], SUM: the gradients of layer s, which ends in state s, instead.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = len(lo)
    LAYER: tl.constexpr = layer_size(WIDTH, ROWS, TAP, len(room) == 0)
    PACKED: tl.constexpr = is_packed(ROWS, TAP)
    LANES: tl.constexpr = lo[0].shape[0]
    matrix = WIDTH * batch
    below = tl.maximum(last - RENORMALISE_PERIOD, phase) * LAYER
    prefetch(weight_ptr, below, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
    if PACKED:
        ahead = read_ahead(weight_ptr + (last - 1) * LAYER, -LAYER, WIDTH, ROWS, False, AHEAD, LANES)
    read: tl.constexpr = read_near if ROWS == FRAGMENT or SUM else read_state  # G is 0 where a state is outside
    row_ptr = h_ptr + (last - 1) * matrix
    if AHEAD > 0:
        next_h = read(row_ptr, column, batch, WIDTH, ROWS)
    if SUM:
        sums = tl.zeros_like(lo[0])
        sums_ptr = g_ptr + (last + 1) * sums_size(WIDTH)
    for down in range(0, last // RENORMALISE_PERIOD - (first + 1) // RENORMALISE_PERIOD + 1):
        chunk = last // RENORMALISE_PERIOD - down
        low = tl.maximum(chunk * RENORMALISE_PERIOD, first + 1)
        high = tl.minimum(chunk * RENORMALISE_PERIOD + RENORMALISE_PERIOD - 1, last)
        below = tl.maximum(low - 1 - RENORMALISE_PERIOD, phase) * LAYER
        prefetch(weight_ptr, below, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        started = high < last
        more = (high - first - 1).to(tl.int32)  # layers after this one
        for i in tl.range(0, (high - low + 1).to(tl.int32), loop_unroll_factor=2 * AHEAD if AHEAD else 1):
            s = high - i
            full = add_states(total, lo, COUNT) if OFFSET else lo
            if STORE:
                write_state(g_ptr + s * matrix, full, column, batch, WIDTH, ROWS)
            if AHEAD > 0:
                h = next_h
                row_ptr -= tl.where(i < more, matrix, 0)
                next_h = read(row_ptr, column, batch, WIDTH, ROWS)
            else:
                h = read(row_ptr, column, batch, WIDTH, ROWS)
                row_ptr -= matrix
            if SUM:  # those of the layer before: no load can come before a store that waits for sums
                write_sums(sums_ptr, sums, started | (i > 0), WIDTH)
                sums = warp_sums(full, h, WIDTH)
                sums_ptr -= sums_size(WIDTH)
            weight = weight_ptr + (s - 1 - AHEAD) * LAYER
            zeros = zeros_like_state(lo, COUNT)
            if PACKED:
                record, ahead = next_record(ahead, weight, WIDTH, ROWS, False, AHEAD, LANES)
                grad = packed_product(record, full, zeros, WIDTH, ROWS, True)
            else:
                grad = affine(weight, full, zeros, room, s % 2, WIDTH, ROWS, True, TAP, HEIGHT, LENGTH, BLOCK)
            if OFFSET:
                grad = add_skip(grad, lo, MIDDLE, COUNT, ROWS, len(column[0]))
            lo = mask_gradient(h, grad, total, OFFSET, COUNT)
        if OFFSET:
            if low % RENORMALISE_PERIOD == 0:
                total, hi, lo = renormalise(base_ptr, total, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
    if SUM:
        write_sums(sums_ptr, sums, first < last, WIDTH)
    return total, hi, lo


@triton.jit(do_not_specialize=LOOSE)
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
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Layers last-1 down to first. STORE: G of states first+1 .. last to ``g``, (last - first, n, B).

    (base, hi, lo), each (n, B), is G of state ``last`` (``masked`` 0: it has still to pass the ReLU of that state), and
    ``result``, (3, n, B), that of state ``first``; lo and (1, n, B) in plain form. ``h``, (states, n, B), begins with
    state first.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    first = first.to(tl.int64) + phase
    last = last.to(tl.int64) + phase
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK, ROWS)
    COUNT: tl.constexpr = entry_count(WIDTH, ROWS) * len(column[0])
    LAYER: tl.constexpr = layer_size(WIDTH, ROWS, TAP, len(room) == 0)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    h_ptr -= first * matrix
    g_ptr -= (first + 1) * matrix
    weight_ptr += (spare_layers(ROWS, TAP) - phase) * LAYER
    total, hi, lo = enter(base_ptr, hi_ptr, lo_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    if masked == 0:
        h = read_state(h_ptr + last * matrix, column, batch, WIDTH, ROWS)
        lo = mask_gradient(h, lo, total, OFFSET, COUNT)
    total, hi, lo = go_back(
        total, hi, lo, base_ptr, weight_ptr, h_ptr, g_ptr, first, last, phase, end, column, batch, room,
        STORE, False, MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, AHEAD, PREFETCH,
    )  # fmt: skip
    leave(result_ptr, base_ptr, hi_ptr, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
