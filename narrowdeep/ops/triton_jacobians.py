"""The kernels that take gradients through segments side by side: unit vectors first, then G.

``narrowdeep.ops.shooting`` has the idea. A segment multiplies a gradient by its transposed Jacobian, in offset form by
the identity part and the rest, which is what is kept: small beside it, it needs no second word.
"""

# ruff: noqa: RUF005 (the kernel language has no starred tuples)
from __future__ import annotations

import triton
import triton.language as tl

from narrowdeep.ops.triton_affine import lanes
from narrowdeep.ops.triton_common import (
    FRAGMENT,
    add_skip,
    add_states,
    entry_count,
    fragment_unit,
    mask_gradient,
    read_state,
    two_sum,
    write_state,
    zeros_like_state,
)
from narrowdeep.ops.triton_kernels import LOOSE, chain_backward

_LOOSE = [*LOOSE, "length"]


@triton.jit
def _own_lanes(BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """What every lane has of a matrix (n, BLOCK) of its program's own."""
    if ROWS == FRAGMENT:
        lane = tl.arange(0, 2 * BLOCK)
        place = lane // 32 * 16 + lane % 32 // 4
    else:
        place = tl.arange(0, BLOCK)
    return ((place,), (place < BLOCK,))


@triton.jit
def _write_unit(ptr, number, column, batch, MIDDLE: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The unit vector of unit ``number`` as a gradient's words: its base, but lo of what a layer does not skip."""
    matrix = WIDTH * batch
    COUNT: tl.constexpr = entry_count(WIDTH, ROWS)
    LANES: tl.constexpr = column[0][0].shape[0]
    vector = ()
    for i in tl.static_range(COUNT):
        unit = fragment_unit(i, LANES) if ROWS == FRAGMENT else i + tl.zeros((LANES,), tl.int32)
        vector = vector + (tl.where(unit == number, 1.0, 0.0).to(ptr.dtype.element_ty),)
    if MIDDLE >= 0:
        zeros = zeros_like_state(vector, COUNT)
        base = ()
        lo = ()
        for i in tl.static_range(COUNT):
            base = base + (tl.where(number == MIDDLE, zeros[i], vector[i]),)
            lo = lo + (tl.where(number == MIDDLE, vector[i], zeros[i]),)
        write_state(ptr, base, column, batch, WIDTH, ROWS)
        write_state(ptr + matrix, zeros, column, batch, WIDTH, ROWS)
        write_state(ptr + 2 * matrix, lo, column, batch, WIDTH, ROWS)
    else:
        write_state(ptr, vector, column, batch, WIDTH, ROWS)


@triton.jit(do_not_specialize=_LOOSE)
def backward_segments(
    base_ptr,
    tops_ptr,
    weight_ptr,
    h_ptr,
    result_ptr,
    g_ptr,
    columns_ptr,
    scratch_ptr,
    batch,
    layers,
    phase,
    first,
    last,
    length,
    JACOBIAN: tl.constexpr,
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
    """``chain_backward`` of layers ``first`` .. ``last`` - 1 in segments that end at multiples of ``length``.

    JACOBIAN: program (block, p n + i) takes the i-th unit vector through segment p + 1, as the lowest one's is not
    needed, to ``columns`` (segments - 1, blocks, n, n, BLOCK), in offset form without what is the identity part's.
    Else program (block, p) takes G with this base and row p of ``tops``, (hi, lo), through segment p, to ``result``
    (segments, words, n, B), which otherwise is scratch memory, (segments - 1, n, words, n, B).
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    COLUMNS: tl.constexpr = WIDTH if JACOBIAN else 1
    matrix = WIDTH * batch.to(tl.int64)
    number = tl.program_id(1) // COLUMNS + (1 if JACOBIAN else 0)
    segment = ((first + phase) // length + number).to(tl.int64)
    begin = tl.maximum(segment * length - phase, first)
    stop = tl.minimum((segment + 1) * length - phase, last)
    result_ptr += tl.program_id(1).to(tl.int64) * ((3 if OFFSET else 1) * matrix)
    hi_ptr = result_ptr + (matrix if OFFSET else 0)
    lo_ptr = result_ptr + (2 * matrix if OFFSET else 0)
    if JACOBIAN:  # the way into the chain is through memory
        column, _ = lanes(scratch_ptr, batch.to(tl.int64), WIDTH, TAP, HEIGHT, LENGTH, BLOCK, ROWS)
        _write_unit(result_ptr, tl.program_id(1) % COLUMNS, column, batch.to(tl.int64), MIDDLE, WIDTH, ROWS)
        tl.debug_barrier()
        base_ptr = result_ptr
    else:
        hi_ptr = tops_ptr + number.to(tl.int64) * ((2 if OFFSET else 1) * matrix)
        lo_ptr = hi_ptr + (matrix if OFFSET else 0)
    chain_backward(
        base_ptr, hi_ptr, lo_ptr, weight_ptr, h_ptr + (begin - first) * matrix, result_ptr,
        g_ptr + (begin - first) * matrix, scratch_ptr, batch, layers, phase, begin, stop, 1,
        STORE, MIDDLE, WIDTH, ROWS, TAP, HEIGHT, LENGTH, BLOCK, ALIGNED, AHEAD, PREFETCH,
    )  # fmt: skip

    if JACOBIAN:
        tl.debug_barrier()
        moved = read_state(lo_ptr, column, matrix // WIDTH, WIDTH, ROWS)
        if OFFSET:
            moved = add_states(moved, read_state(hi_ptr, column, matrix // WIDTH, WIDTH, ROWS), len(moved))
        row = (number - 1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        row = row * WIDTH + tl.program_id(1) % COLUMNS
        write_state(columns_ptr + row * (WIDTH * BLOCK), moved, _own_lanes(BLOCK, ROWS), BLOCK, WIDTH, ROWS)


@triton.jit(do_not_specialize=_LOOSE)
def join_gradients(
    base_ptr,
    hi_ptr,
    lo_ptr,
    h_ptr,
    columns_ptr,
    tops_ptr,
    batch,
    phase,
    first,
    last,
    length,
    count,
    masked,
    MIDDLE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``tops`` (segments, 2, n, B), in plain form (segments, 1, n, B): G = (hi, lo) of the state that ends a segment.

    From (base, hi, lo), that of state ``last``, and the ``columns`` of ``backward_segments``, GROUP segments' at once:
    a step waits for the one before it, a load for none.
    """
    OFFSET: tl.constexpr = MIDDLE >= 0
    batch = batch.to(tl.int64)
    matrix = WIDTH * batch
    lane = tl.arange(0, BLOCK)
    sample = tl.program_id(0).to(tl.int64) * BLOCK + lane
    inside = sample < batch
    column = ((sample,), (inside,))
    lo = read_state(lo_ptr, column, batch, WIDTH, 1)
    base = lo
    hi = lo
    total = lo
    if OFFSET:
        base = read_state(base_ptr, column, batch, WIDTH, 1)
        hi = read_state(hi_ptr, column, batch, WIDTH, 1)
        total = add_states(base, hi, WIDTH)
    if masked == 0:
        h = read_state(h_ptr + (last - first) * matrix, column, batch, WIDTH, 1)
        lo = mask_gradient(h, lo, total, OFFSET, WIDTH)
    tops_ptr += (count - 1) * ((2 if OFFSET else 1) * matrix)
    if OFFSET:
        write_state(tops_ptr, hi, column, batch, WIDTH, 1)
        tops_ptr += matrix
    write_state(tops_ptr, lo, column, batch, WIDTH, 1)
    h_ptr += ((first + phase) // length * length - phase - first) * matrix
    for down in range(0, count - 1, GROUP):
        rows = ()
        for i in tl.static_range(GROUP):
            number = tl.maximum(count - 1 - down - i, 1).to(tl.int64)
            row_ptr = columns_ptr + ((number - 1) * tl.num_programs(0) + tl.program_id(0)) * (WIDTH * WIDTH * BLOCK)
            for k in tl.static_range(WIDTH * WIDTH):
                rows = rows + (tl.load(row_ptr + k * BLOCK + lane),)
            rows = rows + read_state(h_ptr + number * length * matrix, column, batch, WIDTH, 1)
        for i in tl.static_range(GROUP):
            full = add_states(total, lo, WIDTH) if OFFSET else lo
            z = zeros_like_state(lo, WIDTH)
            for c in tl.static_range(WIDTH):
                more = ()
                for k in tl.static_range(WIDTH):
                    more = more + (tl.fma(rows[i * (WIDTH * WIDTH + WIDTH) + c * WIDTH + k], full[c], z[k]),)
                z = more
            h = rows[i * (WIDTH * WIDTH + WIDTH) + WIDTH * WIDTH : (i + 1) * (WIDTH * WIDTH + WIDTH)]
            if OFFSET:
                z = add_skip(z, lo, MIDDLE, WIDTH, 1)
            lo = mask_gradient(h, z, total, OFFSET, WIDTH)
            # A segment ends where states are renormalised.
            number = count - 2 - down - i
            if OFFSET:
                new_hi = ()
                new_lo = ()
                new_total = ()
                for k in tl.static_range(WIDTH):
                    moved, rest = two_sum(hi[k], lo[k])
                    moved = tl.where(h[k] <= 0.0, -base[k], moved)
                    new_hi = new_hi + (hi[k] if k == MIDDLE else moved,)
                    new_lo = new_lo + (lo[k] if k == MIDDLE else tl.where(h[k] <= 0.0, 0.0, rest),)
                    new_total = new_total + (total[k] if k == MIDDLE else base[k] + moved,)
                hi = new_hi
                lo = new_lo
                total = new_total
            column = ((sample,), (inside & (number >= 0),))
            if OFFSET:
                tops_ptr -= 2 * matrix
                write_state(tops_ptr - matrix, hi, column, batch, WIDTH, 1)
            else:
                tops_ptr -= matrix
            write_state(tops_ptr, lo, column, batch, WIDTH, 1)
