"""A hidden layer without its ReLU, on a GPU: what a lane has of a state, and how lanes meet in a convolution.

TAP is 0 for the MLP, the filter size f for a convolution. There are two ways to what neighbouring positions hold:

- Images that fit one warp: a lane takes a strip of a row, and lanes ask one another (shuffles). A value that is read
  once serves all outputs of the strip, and so does a weight; a row's ends cost nothing where the strip is the row.
  There is no scratch memory (``scratch_ptr`` None), and weights are those of ``triton_packed.packed_filters``.
- Larger images: a lane is one position; a layer's input goes through scratch memory with a border of zeros.
"""

# ruff: noqa: RUF005 (the kernel language has no starred tuples)
from __future__ import annotations

import triton
import triton.language as tl

from narrowdeep.ops.triton_common import FRAGMENT, product
from narrowdeep.ops.triton_packed import layer_size, read_vector


@triton.constexpr_function
def strip_length(height, length, samples):
    """Positions of a row that a lane takes where ``samples`` samples share the 32 lanes of a warp; 0: too few lanes."""
    lanes = 32 // samples // height
    return -(-length // lanes) if lanes else 0


@triton.jit
def lanes(
    scratch_ptr,
    batch,
    WIDTH: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr = 1,
):
    """(what every lane has of the state matrix, as ``read_entry`` takes it; the program's room in scratch memory)."""
    if TAP == 0:
        place = tl.program_id(0).to(tl.int64) * BLOCK
        if ROWS == FRAGMENT:
            lane = tl.arange(0, 2 * BLOCK)
            place += lane // 32 * 16 + lane % 32 // 4
        else:
            place += tl.arange(0, BLOCK)
        column = ((place,), (place < batch,))
        room = ()
    elif scratch_ptr is None:
        SPAN: tl.constexpr = strip_length(HEIGHT, LENGTH, BLOCK)
        STRIPS: tl.constexpr = (LENGTH + SPAN - 1) // SPAN
        lane = tl.arange(0, 32)
        sample = tl.program_id(0).to(tl.int64) * BLOCK + lane % BLOCK
        row = lane // (BLOCK * STRIPS)
        first = lane // BLOCK % STRIPS * SPAN
        inside = (row < HEIGHT) & (sample < batch)
        place = ()
        mask = ()
        for s in tl.static_range(SPAN):
            place = place + ((row * LENGTH + first + s) * batch + sample,)
            mask = mask + (inside & (first + s < LENGTH) if LENGTH % SPAN else inside,)
        column = (place, mask)
        room = ()
    else:
        POSITIONS: tl.constexpr = HEIGHT * LENGTH
        RADIUS: tl.constexpr = TAP // 2
        lane = tl.arange(0, triton.next_power_of_2(POSITIONS) * BLOCK)
        inside = lane // BLOCK < POSITIONS
        position = tl.minimum(lane // BLOCK, POSITIONS - 1)
        sample = tl.program_id(0).to(tl.int64) * BLOCK + lane % BLOCK
        column = ((position * batch + sample,), (inside & (sample < batch),))
        row = position // LENGTH + RADIUS
        place = (row * (LENGTH + 2 * RADIUS) + position % LENGTH + RADIUS) * BLOCK + lane % BLOCK
        PLANE: tl.constexpr = (HEIGHT + 2 * RADIUS) * (LENGTH + 2 * RADIUS) * BLOCK
        program = (tl.program_id(0) + tl.program_id(1) * tl.num_programs(0)).to(tl.int64)
        room = (scratch_ptr + program * (2 * WIDTH * PLANE), place, inside)
    return column, room


@triton.jit
def _neighbour(
    strip, down: tl.constexpr, right: tl.constexpr, HEIGHT: tl.constexpr, LENGTH: tl.constexpr, BLOCK: tl.constexpr
):
    """What is ``down`` rows below and ``right`` positions right of a lane's first one; 0 outside the image."""
    SPAN: tl.constexpr = len(strip)
    STRIPS: tl.constexpr = (LENGTH + SPAN - 1) // SPAN
    OVER: tl.constexpr = (right + LENGTH * SPAN) // SPAN - LENGTH  # strips, rounded down
    value = strip[right - OVER * SPAN]
    if down != 0 or OVER != 0:
        lane = tl.arange(0, 32)
        row = lane // (BLOCK * STRIPS) + down
        over = lane // BLOCK % STRIPS + OVER
        inside = (row >= 0) & (row < HEIGHT) & (over >= 0) & (over < STRIPS)
        source = lane + (down * STRIPS + OVER) * BLOCK
        if HEIGHT * STRIPS * BLOCK < 32:  # the last lane is outside and holds 0
            value = tl.gather(value, tl.where(inside, source, 31), 0)
        else:
            value = tl.where(inside, tl.gather(value, tl.where(inside, source, 0), 0), 0.0)
    return value


@triton.jit
def _read_filters(
    weight,
    k,
    down: tl.constexpr,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAP: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Row ``down`` of all filters of input channel k, [tap][unit]; PACKED: of a layer of ``packed_filters``."""
    filters = ()
    if PACKED:
        WORD: tl.constexpr = 128 // weight.dtype.element_ty.primitive_bitwidth
        FIRST: tl.constexpr = (TAP - 1 - down if TRANSPOSED else down) * (TAP * WIDTH)
        row = ()
        for i in tl.static_range(FIRST // WORD, (FIRST + TAP * WIDTH + WORD - 1) // WORD):
            row = row + read_vector(weight + k * (layer_size(WIDTH, 1, TAP, True) // WIDTH) + i * WORD)
    for right in tl.static_range(TAP):
        t = down * TAP + right
        for i in tl.static_range(WIDTH):
            if PACKED:
                factor = row[FIRST % WORD + (TAP - 1 - right if TRANSPOSED else right) * WIDTH + i]
            elif TRANSPOSED:
                factor = tl.load(weight + (k * WIDTH + i) * (TAP * TAP) + TAP * TAP - 1 - t)
            else:
                factor = tl.load(weight + (i * WIDTH + k) * (TAP * TAP) + t)
            filters = filters + (factor,)
    return filters


@triton.jit
def _correlate(filters, values, result, WIDTH: tl.constexpr, TAP: tl.constexpr):
    """result + a row of filters times a row of an input channel, with what is left and right of it or without."""
    SPAN: tl.constexpr = len(result) // WIDTH
    EDGE: tl.constexpr = (SPAN + TAP - 1 - len(values)) // 2
    for right in tl.static_range(TAP):
        new = ()
        for i in tl.static_range(WIDTH):
            factor = filters[right * WIDTH + i]
            for s in tl.static_range(SPAN):
                total = result[i * SPAN + s]
                if s + right >= EDGE and s + right < EDGE + len(values):
                    value = values[s + right - EDGE]
                    total = tl.fma(tl.broadcast_to(factor, value.shape), value, total)
                new = new + (total,)
        result = new
    return result


@triton.jit
def _add_channel(
    weight,
    strip,
    result,
    k,
    WIDTH: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAP: tl.constexpr,
    HEIGHT: tl.constexpr,
    LENGTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """result + the filters of input channel k times its strips of rows, one a lane."""
    RADIUS: tl.constexpr = TAP // 2
    REACH: tl.constexpr = RADIUS if len(strip) < LENGTH else 0
    for down in tl.static_range(TAP):
        values = ()
        for right in tl.static_range(-REACH, len(strip) + REACH):
            values = values + (_neighbour(strip, down - RADIUS, right, HEIGHT, LENGTH, BLOCK),)
        filters = _read_filters(weight, k, down, WIDTH, TRANSPOSED, TAP, True)
        result = _correlate(filters, values, result, WIDTH, TAP)
    return result


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

    START has an entry a unit or an entry for each of the state's. ``turn`` alternates between 0 and 1 from call to
    call: of two halves of scratch memory one is written while some lanes still read the other, so that one barrier a
    call is enough.
    """
    if TAP == 0:
        return product(weight, state, START, WIDTH, ROWS, TRANSPOSED)
    else:
        RADIUS: tl.constexpr = TAP // 2
        SPAN: tl.constexpr = len(state) // WIDTH
        result = ()
        for i in tl.static_range(len(state)):
            result = result + (tl.broadcast_to(START[i * len(START) // len(state)], state[0].shape),)
        if len(room) == 0:
            STRIPS: tl.constexpr = (LENGTH + SPAN - 1) // SPAN
            lane = tl.arange(0, 32)
            h = ()
            for i in tl.static_range(len(state)):
                inside = (lane < HEIGHT * STRIPS * BLOCK) & (lane // BLOCK % STRIPS * SPAN + i % SPAN < LENGTH)
                h = h + (tl.where(inside, state[i], 0.0),)
            if WIDTH * WIDTH * TAP * TAP * SPAN <= 570:
                for k in tl.static_range(WIDTH):
                    strip = h[k * SPAN : k * SPAN + SPAN]
                    result = _add_channel(weight, strip, result, k, WIDTH, TRANSPOSED, TAP, HEIGHT, LENGTH, BLOCK)
            else:  # unrolled it would take minutes to compile: channels take turns in one place
                for k in range(WIDTH):
                    strip = h[:SPAN]
                    result = _add_channel(weight, strip, result, k, WIDTH, TRANSPOSED, TAP, HEIGHT, LENGTH, BLOCK)
                    h = h[SPAN:] + strip
        else:
            PLANE: tl.constexpr = (HEIGHT + 2 * RADIUS) * (LENGTH + 2 * RADIUS) * BLOCK
            scratch = room[0] + turn * (WIDTH * PLANE)
            for i in tl.static_range(WIDTH):
                tl.store(scratch + i * PLANE + room[1], state[i], mask=room[2])
            tl.debug_barrier()
            for k in range(WIDTH):
                for down in tl.static_range(TAP):
                    values = ()
                    for right in tl.static_range(TAP):
                        shift = ((down - RADIUS) * (LENGTH + 2 * RADIUS) + right - RADIUS) * BLOCK
                        values = values + (tl.load(scratch + k * PLANE + room[1] + shift),)
                    filters = _read_filters(weight, k, down, WIDTH, TRANSPOSED, TAP, False)
                    result = _correlate(filters, values, result, WIDTH, TAP)
        return result
