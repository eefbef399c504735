"""The backward of many segments in one launch, for batches that keep a device busy without segments side by side.

A program, one warp, goes with its samples through the segments from the top: it computes a segment's states again,
follows G down through them and sums the weights' gradients over its samples. G stays in registers, states in the
second-level cache as long as they fit. ``triton_kernels.py`` has the backward in three kernels, which is faster where
few samples are in flight.
"""

# ruff: noqa: RUF005 (a constexpr `if` must stand alone; the kernel language has no starred tuples)
from __future__ import annotations

import triton
import triton.language as tl

from narrowdeep.ops.triton_common import enter, leave, mask_gradient, read_state
from narrowdeep.ops.triton_kernels import LOOSE, advance, go_back
from narrowdeep.ops.triton_packed import layer_size, spare_layers
from narrowdeep.ops.triton_sums import sums_size


@triton.jit(do_not_specialize=[*LOOSE, "known"])
def chain_whole(
    base_ptr,
    hi_ptr,
    lo_ptr,
    first_base_ptr,
    given_ptr,
    saved_ptr,
    weight_ptr,
    bias_ptr,
    h_ptr,
    result_ptr,
    partial_ptr,
    scratch_ptr,
    batch,
    layers,
    segment,
    phase,
    first,
    last,
    masked,
    given,
    known,
    RECOMPUTE: tl.constexpr,
    SUM: tl.constexpr,
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
    """Layers last-1 down to first; (base, hi, lo), ``result`` and ``masked`` as ``chain_backward`` has them.

    RECOMPUTE: segments start as in ``chain_recompute`` (``first_base`` is the state's base there), ``first`` is a
    multiple of ``segment``, and ``h``, (segment + 1, n, B), takes the states of one segment at a time; those from state
    ``known`` on are already there. Else ``h``, (states, n, B), begins with state first and ``segment`` is at least
    ``last``. SUM: gradients of the layers' weights and biases, summed over a program's samples, to ``partial``,
    (programs, last - first, n (n + 1)).
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    WORDS: tl.constexpr = 2 if OFFSET else 1
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    segment = segment.to(tl.int64)
    first = first.to(tl.int64) + phase
    last = last.to(tl.int64) + phase
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    place = ()
    inside = ()
    for i in tl.static_range(BLOCK // 32):
        sample = tl.program_id(0).to(tl.int64) * BLOCK + i * 32 + tl.arange(0, 32)
        place = place + (sample,)
        inside = inside + (sample < batch,)
    column = (place, inside)
    COUNT: tl.constexpr = WIDTH * (BLOCK // 32)
    LAYER: tl.constexpr = layer_size(WIDTH, ROWS, TAP)
    matrix = WIDTH * batch
    weight_ptr += (spare_layers(ROWS, TAP) - phase) * LAYER
    partial_ptr += (tl.program_id(0).to(tl.int64) * (last - first) - first - 1) * sums_size(WIDTH)
    total, hi, lo = enter(base_ptr, hi_ptr, lo_ptr, column, batch, MIDDLE, WIDTH, ROWS)
    top = (last - phase - 1) // segment
    if masked == 0:
        h = read_state(h_ptr + (last - tl.maximum(phase + top * segment, first)) * matrix, column, batch, WIDTH, ROWS)
        lo = mask_gradient(h, lo, total, OFFSET, COUNT)
    for down in range(0, top - (first - phase) // segment + 1):
        number = top - down
        start = tl.maximum(phase + number * segment, first)
        stop = tl.minimum(start + segment, last)
        row_h_ptr = h_ptr - start * matrix
        if RECOMPUTE:
            if start < known + phase:
                row_ptr = saved_ptr + (number - given) * (WORDS * matrix)
                if number < given:
                    row_ptr = given_ptr
                row_lo_ptr = row_ptr + (WORDS - 1) * matrix
                state, hi_0, lo_0 = enter(first_base_ptr, row_ptr, row_lo_ptr, column, batch, MIDDLE, WIDTH, ROWS)
                advance(
                    state, hi_0, lo_0, first_base_ptr, weight_ptr, bias_ptr, row_h_ptr, start, stop, end, column,
                    batch, (), MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, True, AHEAD, PREFETCH,
                )  # fmt: skip
            tl.debug_barrier()  # a lane may read what another one wrote, and write what another one has to read
        total, hi, lo = go_back(
            total, hi, lo, base_ptr, weight_ptr, row_h_ptr, partial_ptr, start, stop, phase, end, column, batch, (),
            False, SUM, MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, AHEAD, PREFETCH,
        )  # fmt: skip
        if RECOMPUTE:
            tl.debug_barrier()
    leave(result_ptr, base_ptr, hi_ptr, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
