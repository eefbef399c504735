"""The kernels that take states through segments side by side, and join them: ``narrowdeep.ops.shooting`` says how."""

# ruff: noqa: RUF005, SIM102 (the kernel language has no starred tuples; a constexpr `if` must stand alone)
from __future__ import annotations

import triton
import triton.language as tl

from narrowdeep.ops.triton_affine import lanes
from narrowdeep.ops.triton_common import (
    RENORMALISE_PERIOD,
    add_skip,
    add_states,
    clip,
    enter,
    entry_count,
    leave,
    prefetch,
    renormalise,
    two_sum,
    write_state,
    zeros_like_state,
)
from narrowdeep.ops.triton_kernels import LOOSE, chain_forward
from narrowdeep.ops.triton_packed import (
    layer_size,
    next_record,
    packed_product,
    read_ahead,
    record_bias,
    spare_layers,
)

_LOOSE = [*LOOSE, "length", "turn"]


@triton.jit
def _left(failed_ptr, turn, PARTS: tl.constexpr):
    """Whether this block of samples, which ``join_states`` takes in PARTS, is not done before turn ``turn``."""
    failed = tl.full((), 1.0, tl.float32)
    if turn > 0:
        part = tl.program_id(0) * PARTS + tl.arange(0, PARTS)
        failed = tl.max(tl.load(failed_ptr + part), axis=0).to(tl.float32)
    return failed > 0.0


@triton.jit
def _advance_pushed(
    total,
    hi,
    lo,
    pushed,
    base_ptr,
    weight_ptr,
    h_ptr,
    start,
    stop,
    end,
    column,
    batch,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    STORE: tl.constexpr,
    AHEAD: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """The forward's loop (``triton_kernels``) that also adds up how far the ReLU of each layer lifts a unit."""
    COUNT: tl.constexpr = len(lo)
    LAYER: tl.constexpr = layer_size(WIDTH, ROWS, 0)
    LANES: tl.constexpr = lo[0].shape[0]
    ahead = read_ahead(weight_ptr + start * LAYER, LAYER, WIDTH, ROWS, True, AHEAD, LANES)
    for chunk in range(start // RENORMALISE_PERIOD, (stop + RENORMALISE_PERIOD - 1) // RENORMALISE_PERIOD):
        low = tl.maximum(chunk * RENORMALISE_PERIOD, start)
        high = tl.minimum(chunk * RENORMALISE_PERIOD + RENORMALISE_PERIOD, stop)
        prefetch(weight_ptr, high * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        for j in tl.range(low, high, loop_unroll_factor=2 * AHEAD if AHEAD else 1):
            h = add_states(total, lo, COUNT)
            if STORE:
                write_state(h_ptr + j * (WIDTH * batch), h, column, batch, WIDTH, ROWS)
            record, ahead = next_record(ahead, weight_ptr + (j + AHEAD) * LAYER, WIDTH, ROWS, True, AHEAD, LANES)
            z = packed_product(record, h, record_bias(record, WIDTH, ROWS), WIDTH, ROWS, False)
            z = add_skip(z, lo, MIDDLE, COUNT, ROWS)
            lo = clip(z, total, True, COUNT)
            more = ()
            for i in tl.static_range(COUNT):
                more = more + (pushed[i] + (lo[i] - z[i]),)
            pushed = more
        if high % RENORMALISE_PERIOD == 0:
            total, hi, lo = renormalise(base_ptr, total, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)
    return total, hi, lo, pushed


@triton.jit(do_not_specialize=_LOOSE)
def chain_segments(
    base_ptr,
    hi_ptr,
    lo_ptr,
    weight_ptr,
    starts_ptr,
    failed_ptr,
    saved_ptr,
    final_ptr,
    ends_ptr,
    pushed_ptr,
    scratch_ptr,
    batch,
    layers,
    segment,
    phase,
    length,
    turn,
    PARTS: tl.constexpr,
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
    """``chain_forward`` of program (block, p)'s segment: states p length .. (p + 1) length, counted as ``phase`` is.

    Segment 0, and every one in turn 0, starts from (base, hi, lo), others from row p - 1 of ``starts``, (hi, lo).
    Writes ``ends`` (segments, 2, n, B) and ``pushed`` (segments, n, B), and its part of ``saved`` and ``final``.
    """
    batch = batch.to(tl.int64)
    phase = phase.to(tl.int64)
    end = layers.to(tl.int64) + phase
    segment = segment.to(tl.int64)
    if ALIGNED:
        batch = tl.multiple_of(batch, 4)
    if _left(failed_ptr, turn, PARTS):
        column, _ = lanes(scratch_ptr, batch, WIDTH, TAP, HEIGHT, LENGTH, BLOCK, ROWS)
        COUNT: tl.constexpr = entry_count(WIDTH, ROWS)
        LAYER: tl.constexpr = layer_size(WIDTH, ROWS, TAP)
        matrix = WIDTH * batch
        number = tl.program_id(1).to(tl.int64)
        start = tl.maximum(number * length, phase)
        stop = tl.minimum((number + 1) * length, end)
        weight_ptr += (spare_layers(ROWS, TAP) - phase) * LAYER
        prefetch(weight_ptr, start * LAYER, end * LAYER, RENORMALISE_PERIOD * LAYER, PREFETCH)
        start_hi_ptr = hi_ptr
        start_lo_ptr = lo_ptr
        if (number > 0) & (turn > 0):
            start_hi_ptr = starts_ptr + (number - 1) * (2 * matrix)
            start_lo_ptr = start_hi_ptr + matrix
        total, hi, lo = enter(base_ptr, start_hi_ptr, start_lo_ptr, column, batch, MIDDLE, WIDTH, ROWS)
        pushed = zeros_like_state(lo, COUNT)
        first = (start - phase) // segment
        if SAVE == 1:
            saved_ptr -= phase * matrix
        for row in range(first, (stop - phase + segment - 1) // segment):
            low = tl.maximum(phase + row * segment, start)
            high = tl.minimum(phase + (row + 1) * segment, stop)
            if SAVE == 2:
                if low == phase + row * segment:
                    write_state(saved_ptr + 2 * row * matrix, hi, column, batch, WIDTH, ROWS)
                    write_state(saved_ptr + (2 * row + 1) * matrix, lo, column, batch, WIDTH, ROWS)
            total, hi, lo, pushed = _advance_pushed(
                total, hi, lo, pushed, base_ptr, weight_ptr, saved_ptr, low, high, end, column, batch,
                MIDDLE, WIDTH, ROWS, SAVE == 1, AHEAD, PREFETCH,
            )  # fmt: skip
        write_state(ends_ptr + 2 * number * matrix, hi, column, batch, WIDTH, ROWS)
        write_state(ends_ptr + (2 * number + 1) * matrix, lo, column, batch, WIDTH, ROWS)
        write_state(pushed_ptr + number * matrix, pushed, column, batch, WIDTH, ROWS)
        if stop == end:
            if SAVE == 1:
                h = add_states(total, lo, COUNT)
                write_state(saved_ptr + end * matrix, h, column, batch, WIDTH, ROWS)
            leave(final_ptr, base_ptr, hi_ptr, hi, lo, column, batch, MIDDLE, WIDTH, ROWS)


@triton.jit
def _after(slope, floor, next_slope, next_floor):
    """x -> max(x + slope, floor), then the next such map, as one."""
    return slope + next_slope, tl.maximum(floor + next_slope, next_floor)


@triton.jit
def _most(x):
    """The largest entry of each sample."""
    return tl.max(tl.max(x, axis=0), axis=0)


@triton.jit(do_not_specialize=_LOOSE)
def join_states(
    base_ptr,
    hi_ptr,
    lo_ptr,
    ends_ptr,
    pushed_ptr,
    starts_ptr,
    failed_ptr,
    batch,
    count,
    turn,
    BOUND: tl.constexpr,
    MIDDLE_BOUND: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """New ``starts`` (count - 1, 2, n, B) of segments 1 .. count - 1; ``failed`` (programs,): 1 unless the old ones do.

    Entries are [segment, unit, sample]; what a change of a unit does to the others is left to the next turn.
    """
    batch = batch.to(tl.int64)
    if _left(failed_ptr, turn, 1):
        matrix = WIDTH * batch
        number = tl.arange(0, SEGMENTS)[:, None, None].to(tl.int64)
        unit = tl.arange(0, triton.next_power_of_2(WIDTH))[None, :, None]
        sample = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        inside = (unit < WIDTH) & (sample < batch)
        here = inside & (number < count)
        joint = inside & (number < count - 1)
        skipped = here & (unit != MIDDLE)
        place = unit * batch + sample
        old_hi_ptr = hi_ptr
        old_lo_ptr = lo_ptr
        row = matrix - matrix
        if turn > 0:
            old_hi_ptr = starts_ptr
            old_lo_ptr = starts_ptr + matrix
            row = 2 * matrix
        base = tl.load(base_ptr + place, mask=inside, other=0.0)
        pushed = tl.load(pushed_ptr + number * matrix + place, mask=here, other=0.0)
        hi = tl.load(ends_ptr + 2 * number * matrix + place, mask=joint, other=0.0)
        lo = tl.load(ends_ptr + (2 * number + 1) * matrix + place, mask=joint, other=0.0)
        old_hi = tl.load(old_hi_ptr + number * row + place, mask=joint, other=0.0)
        old_lo = tl.load(old_lo_ptr + number * row + place, mask=joint, other=0.0)
        gap = (hi - old_hi) + (lo - old_lo)
        total = base + hi
        # What is not finite is counted, and takes part in nothing else: a maximum might not say that it was there.
        sound = (tl.abs(gap) + tl.abs(total + lo)) * 0.0 == 0.0
        gap = tl.where(sound, gap, 0.0)
        # A start does not go below its floor; a unit that was lifted follows it from where it would not have been.
        floor = tl.where(joint & sound, -((base + old_hi) + old_lo), -float("inf"))
        floor = tl.where(pushed > 0.0, tl.maximum(gap, floor), floor)
        slope = tl.where(skipped, gap - tl.where(pushed > 0.0, pushed, 0.0), 0.0)
        slope, floor = tl.associative_scan((slope, tl.where(skipped, floor, 0.0)), 0, _after)
        change = tl.maximum(slope, floor)
        size = _most(tl.where(skipped & sound, tl.abs(hi + lo), 0.0))
        whole = _most(tl.where(joint & sound, tl.abs(total + lo), 0.0))
        near = (_most(tl.where(here, tl.abs(change), 0.0)) <= BOUND * size) & (_most(tl.where(sound, 0.0, 1.0)) == 0.0)
        near = near & (_most(tl.where(skipped, 0.0, tl.abs(gap))) <= MIDDLE_BOUND * whole)
        new = lo + (change - gap)
        new = tl.where(new < -total, -total, new)
        new_hi, new_lo = two_sum(hi, new)
        dead = total + new == 0.0
        new_hi = tl.where(skipped, tl.where(dead, -base, new_hi), hi)
        new_lo = tl.where(skipped, tl.where(dead, 0.0, new_lo), lo)
        tl.store(starts_ptr + 2 * number * matrix + place, new_hi, mask=joint)
        tl.store(starts_ptr + (2 * number + 1) * matrix + place, new_lo, mask=joint)
        failed = tl.max(tl.where(near, 0.0, 1.0), axis=0)
        tl.store(failed_ptr + tl.program_id(0), failed.to(failed_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=_LOOSE)
def chain_sequential(
    failed_ptr,
    base_ptr,
    hi_ptr,
    lo_ptr,
    weight_ptr,
    saved_ptr,
    final_ptr,
    scratch_ptr,
    batch,
    layers,
    segment,
    phase,
    PARTS: tl.constexpr,
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
    """``chain_forward`` of the blocks of samples whose segments have not met."""
    if _left(failed_ptr, 1, PARTS):
        chain_forward(
            base_ptr, hi_ptr, lo_ptr, weight_ptr, weight_ptr, saved_ptr, final_ptr, scratch_ptr, batch, layers, segment,
            phase, SAVE, MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, ALIGNED, AHEAD, PREFETCH,
        )  # fmt: skip
