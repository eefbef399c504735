"""The Triton kernels that carry tangents: of a span's output, and of its backward (forward over reverse).

As ``triton_kernels``, with a second state beside each: T, the tangent of a state, or G', that of its gradient. The
tangent of a backward goes through a span as the backward does: ``chain_tangents`` keeps states and tangents where
segments begin, then brings back those of a group of segments; ``chain_backward_jvp`` follows G and G' down through it.
The family's weight gradient kernel sums G' h^T and G T^T.
"""

# ruff: noqa: SIM102 (a constexpr `if` must stand alone)
from __future__ import annotations

import triton
import triton.language as tl

from narrowdeep.ops.triton_affine import affine, lanes
from narrowdeep.ops.triton_common import (
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
    read_state,
    renormalise,
    write_state,
    zeros_like_state,
)
from narrowdeep.ops.triton_kernels import LOOSE
from narrowdeep.ops.triton_packed import layer_size


@triton.jit
def _advance_tangents(
    total,
    hi,
    lo,
    total_t,
    hi_t,
    lo_t,
    base_ptr,
    base_t_ptr,
    weight_ptr,
    bias_ptr,
    weight_t_ptr,
    bias_t_ptr,
    h_ptr,
    t_ptr,
    start,
    stop,
    end,
    column,
    batch,
    room,
    HAS_WEIGHT_T: tl.constexpr,
    HAS_BIAS_T: tl.constexpr,
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
    """``triton_kernels.advance`` of a state and its tangent. STORE: their values go to h_ptr[s] and t_ptr[s]."""
    OFFSET: tl.constexpr = MIDDLE >= 0
    COUNT: tl.constexpr = len(lo)
    LAYER: tl.constexpr = layer_size(WIDTH, 0, TAP, len(room) == 0)
    for chunk in range(start // RENORMALISE_PERIOD, (stop + RENORMALISE_PERIOD - 1) // RENORMALISE_PERIOD):
        low = tl.maximum(chunk * RENORMALISE_PERIOD, start)
        high = tl.minimum(chunk * RENORMALISE_PERIOD + RENORMALISE_PERIOD, stop)
        prefetch(weight_ptr, high * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        if HAS_WEIGHT_T:
            prefetch(weight_t_ptr, high * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        h_row_ptr = h_ptr + low * (WIDTH * batch)
        t_row_ptr = t_ptr + low * (WIDTH * batch)
        for j in range(low, high):
            h = add_states(total, lo, COUNT) if OFFSET else lo
            full = add_states(total_t, lo_t, COUNT) if OFFSET else lo_t
            if STORE:
                write_state(h_row_ptr, h, column, batch, WIDTH, ROWS)
                write_state(t_row_ptr, full, column, batch, WIDTH, ROWS)
                h_row_ptr += WIDTH * batch
                t_row_ptr += WIDTH * batch
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
                dz = add_skip(dz, lo_t, MIDDLE, COUNT, ROWS, len(column[0]))
                z = add_skip(z, lo, MIDDLE, COUNT, ROWS, len(column[0]))
            lo = clip(z, total, OFFSET, COUNT)
            lo_t = mask_gradient(add_states(total, lo, COUNT) if OFFSET else lo, dz, total_t, OFFSET, COUNT)
        if OFFSET:
            if high % RENORMALISE_PERIOD == 0:
                total, hi, lo = renormalise(base_ptr, total, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
                total_t, hi_t, lo_t = renormalise(base_t_ptr, total_t, hi_t, lo_t, column, batch, MIDDLE, WIDTH, ROWS)
    return total, hi, lo, total_t, hi_t, lo_t


@triton.jit(do_not_specialize=LOOSE)
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
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    COUNT: tl.constexpr = entry_count(WIDTH, ROWS) * len(column[0])
    LAYER: tl.constexpr = layer_size(WIDTH, 0, TAP, len(room) == 0)
    batch *= HEIGHT * LENGTH
    weight_ptr -= phase * LAYER
    bias_ptr -= phase * WIDTH
    weight_t_ptr -= phase * LAYER
    bias_t_ptr -= phase * WIDTH
    total, hi, lo = enter(base_ptr, hi_ptr, lo_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    total_t, hi_t, lo_t = enter(base_t_ptr, hi_t_ptr, lo_t_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    prefetch(weight_ptr, phase * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
    total, hi, lo, total_t, hi_t, lo_t = _advance_tangents(
        total, hi, lo, total_t, hi_t, lo_t, base_ptr, base_t_ptr, weight_ptr, bias_ptr, weight_t_ptr, bias_t_ptr,
        h_ptr, h_ptr, phase, end, end, column, batch, room, HAS_WEIGHT_T, HAS_BIAS_T,
        MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, False, PREFETCH,
    )  # fmt: skip
    h = add_states(total, lo, COUNT) if OFFSET else lo
    write_state(h_ptr, h, column, batch, WIDTH, ROWS)
    leave(final_ptr, base_t_ptr, hi_t_ptr, hi_t, lo_t, column, batch, MIDDLE, WIDTH, ROWS)


@triton.jit(do_not_specialize=LOOSE)
def chain_tangents(
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
    kept_ptr,
    h_ptr,
    t_ptr,
    scratch_ptr,
    batch,
    layers,
    segment,
    phase,
    first,
    count,
    STORE: tl.constexpr,
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
    """Program (block, i): a state and its tangent through ``count`` segments from segment first + i on.

    Segment 0 starts from (base, hi, lo) and (base_t, hi_t, lo_t), segment s from row s - 1 of ``kept``: (hi, lo, hi_t,
    lo_t), or (lo, lo_t) in plain form. STORE: values of all states on the way, the very last one too, go to ``h`` and
    ``t``, (states, n, B), which begin with state first * segment. Else the row behind each segment is written.
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
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    COUNT: tl.constexpr = entry_count(WIDTH, ROWS) * len(column[0])
    LAYER: tl.constexpr = layer_size(WIDTH, 0, TAP, len(room) == 0)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    number = first + tl.program_id(1)
    h_ptr -= (phase + first * segment) * matrix
    t_ptr -= (phase + first * segment) * matrix
    weight_ptr -= phase * LAYER
    bias_ptr -= phase * WIDTH
    weight_t_ptr -= phase * LAYER
    bias_t_ptr -= phase * WIDTH
    prefetch(weight_ptr, (phase + number * segment) * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
    if number > 0:
        hi_ptr = kept_ptr + (number - 1) * (2 * WORDS * matrix)
        lo_ptr = hi_ptr + (WORDS - 1) * matrix
        hi_t_ptr = hi_ptr + WORDS * matrix
        lo_t_ptr = lo_ptr + WORDS * matrix
    total, hi, lo = enter(base_ptr, hi_ptr, lo_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    total_t, hi_t, lo_t = enter(base_t_ptr, hi_t_ptr, lo_t_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    for i in range(number, number + count):
        start = phase + i * segment
        stop = tl.minimum(start + segment, end)
        total, hi, lo, total_t, hi_t, lo_t = _advance_tangents(
            total, hi, lo, total_t, hi_t, lo_t, base_ptr, base_t_ptr, weight_ptr, bias_ptr, weight_t_ptr, bias_t_ptr,
            h_ptr, t_ptr, start, stop, end, column, batch, room, HAS_WEIGHT_T, HAS_BIAS_T,
            MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, STORE, PREFETCH,
        )  # fmt: skip
        if STORE:
            if stop == end:
                h = add_states(total, lo, COUNT) if OFFSET else lo
                full = add_states(total_t, lo_t, COUNT) if OFFSET else lo_t
                write_state(h_ptr + end * matrix, h, column, batch, WIDTH, ROWS)
                write_state(t_ptr + end * matrix, full, column, batch, WIDTH, ROWS)
        else:
            row_ptr = kept_ptr + i * (2 * WORDS * matrix)
            if OFFSET:
                write_state(row_ptr, hi, column, batch, WIDTH, ROWS)
                write_state(row_ptr + 2 * matrix, hi_t, column, batch, WIDTH, ROWS)
            write_state(row_ptr + (WORDS - 1) * matrix, lo, column, batch, WIDTH, ROWS)
            write_state(row_ptr + (2 * WORDS - 1) * matrix, lo_t, column, batch, WIDTH, ROWS)


@triton.jit(do_not_specialize=LOOSE)
def chain_backward_jvp(
    base_ptr,
    hi_ptr,
    lo_ptr,
    base_t_ptr,
    hi_t_ptr,
    lo_t_ptr,
    weight_ptr,
    weight_t_ptr,
    h_ptr,
    result_ptr,
    result_t_ptr,
    g_ptr,
    g_t_ptr,
    scratch_ptr,
    batch,
    layers,
    phase,
    first,
    last,
    masked,
    HAS_WEIGHT_T: tl.constexpr,
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
    """``chain_backward`` of G with its tangent: G'(s) = mask (W^T G'(s + 1) + W_t^T G(s + 1)).

    (base_t, hi_t, lo_t) is G' of state ``last``, ``result_t`` that of state ``first``. STORE: G' to ``g_t`` as G to
    ``g``.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    first = first.to(tl.int64) + phase
    last = last.to(tl.int64) + phase
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    column, room = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK)
    COUNT: tl.constexpr = entry_count(WIDTH, ROWS) * len(column[0])
    LAYER: tl.constexpr = layer_size(WIDTH, 0, TAP, len(room) == 0)
    batch *= HEIGHT * LENGTH
    matrix = WIDTH * batch
    h_ptr -= first * matrix
    g_ptr -= (first + 1) * matrix
    g_t_ptr -= (first + 1) * matrix
    weight_ptr -= phase * LAYER
    weight_t_ptr -= phase * LAYER
    ahead = tl.maximum(last - RENORMALISE_PERIOD, phase) * LAYER
    prefetch(weight_ptr, ahead, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
    total, hi, lo = enter(base_ptr, hi_ptr, lo_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    total_t, hi_t, lo_t = enter(base_t_ptr, hi_t_ptr, lo_t_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    if masked == 0:
        h = read_state(h_ptr + last * matrix, column, batch, WIDTH, ROWS)
        lo = mask_gradient(h, lo, total, OFFSET, COUNT)
        lo_t = mask_gradient(h, lo_t, total_t, OFFSET, COUNT)
    for down in range(0, last // RENORMALISE_PERIOD - (first + 1) // RENORMALISE_PERIOD + 1):
        chunk = last // RENORMALISE_PERIOD - down
        low = tl.maximum(chunk * RENORMALISE_PERIOD, first + 1)
        high = tl.minimum(chunk * RENORMALISE_PERIOD + RENORMALISE_PERIOD - 1, last)
        ahead = tl.maximum(low - 1 - RENORMALISE_PERIOD, phase) * LAYER
        prefetch(weight_ptr, ahead, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        if HAS_WEIGHT_T:
            prefetch(weight_t_ptr, ahead, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        for i in range(0, high - low + 1):
            s = high - i
            full = add_states(total, lo, COUNT) if OFFSET else lo
            full_t = add_states(total_t, lo_t, COUNT) if OFFSET else lo_t
            if STORE:
                write_state(g_ptr + s * matrix, full, column, batch, WIDTH, ROWS)
                write_state(g_t_ptr + s * matrix, full_t, column, batch, WIDTH, ROWS)
            h = read_state(h_ptr + (s - 1) * matrix, column, batch, WIDTH, ROWS)
            weight = weight_ptr + (s - 1) * LAYER
            zeros = zeros_like_state(lo, COUNT)
            grad_t = zeros
            if HAS_WEIGHT_T:
                grad_t = affine(
                    weight_t_ptr + (s - 1) * LAYER, full, zeros, room, s % 2,
                    WIDTH, ROWS, True, TAP, HEIGHT, LENGTH, BLOCK,
                )  # fmt: skip
            turn = (s + 1) % 2 if HAS_WEIGHT_T else 0
            grad_t = affine(weight, full_t, grad_t, room, turn, WIDTH, ROWS, True, TAP, HEIGHT, LENGTH, BLOCK)
            grad = affine(weight, full, zeros, room, 1 - turn, WIDTH, ROWS, True, TAP, HEIGHT, LENGTH, BLOCK)
            if OFFSET:
                grad_t = add_skip(grad_t, lo_t, MIDDLE, COUNT, ROWS, len(column[0]))
                grad = add_skip(grad, lo, MIDDLE, COUNT, ROWS, len(column[0]))
            lo_t = mask_gradient(h, grad_t, total_t, OFFSET, COUNT)
            lo = mask_gradient(h, grad, total, OFFSET, COUNT)
        if OFFSET:
            if low % RENORMALISE_PERIOD == 0:
                total, hi, lo = renormalise(base_ptr, total, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
                total_t, hi_t, lo_t = renormalise(base_t_ptr, total_t, hi_t, lo_t, column, batch, MIDDLE, WIDTH, ROWS)
    leave(result_ptr, base_ptr, hi_ptr, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
    leave(result_t_ptr, base_t_ptr, hi_t_ptr, hi_t, lo_t, column, batch, MIDDLE, WIDTH, ROWS)
