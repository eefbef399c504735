"""A hidden layer's weights and bias in one record of memory, and the products of a record with a state.

Every lane (ROWS = 1), or every warp (ROWS = FRAGMENT), needs all weights. A load brings 16 bytes, and the records of
the next layers are asked for before the present one is used: few warps are there to hide a load behind.

Fragments are products on tensor cores at the accuracy of float32. They multiply numbers of 11 bits, so a float32 is
split into two of those, and three of the four products are formed: the fourth is below float32's rounding. A warp takes
16 samples. What the accumulator has in a lane, units 2 q and 2 q + 1 of samples p and p + 8 for lane 4 p + q, is what
the next layer's left operand has there if its columns q and q + 4 stand for units 2 q and 2 q + 1; so no number changes
lanes between layers, and the weights are in that order in memory. An infinity becomes a NaN.
"""

# ruff: noqa: RUF005 (the kernel language has no starred tuples)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from narrowdeep.ops.triton_common import FRAGMENT, entry_count

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""The interpreter knows no inline assembly."""

SPARE = tl.constexpr(4)
"""Records of zeros at both ends, so that a chain reads ahead, at most as many, without asking where it ends."""


@triton.constexpr_function
def is_packed(rows, tap):
    """Whether hidden layers come as records."""
    return rows in (1, 8) and tap == 0


@triton.constexpr_function
def spare_layers(rows, tap):
    """Records before the first layer."""
    return SPARE.value if is_packed(rows, tap) else 0


@triton.constexpr_function
def layer_size(width, rows, tap, shuffled=False):
    """Numbers from a hidden layer to the next; ``shuffled``: as ``packed_filters`` has a convolution's."""
    if tap:
        return width * (-(-width * tap**2 // 4) * 4) if shuffled else (width * tap) ** 2
    if rows == 8:  # a tile of 8 x 8 weights is two numbers a lane, each in two parts; 16 biases
        return ((width + 7) // 8) ** 2 * 128 + 16
    return (width * (width + 1) + 3) // 4 * 4 if rows == 1 else width * width


@triton.constexpr_function
def record_size(width, rows, bias):
    """Numbers of a record that a lane reads, with or without the bias."""
    if rows == 8:
        return ((width + 7) // 8) ** 2 * 4 + (4 if bias else 0)
    return (width * (width + 1 if bias else width) + 3) // 4 * 4


@triton.jit
def split(x):
    """x as a sum of two numbers, the first of 11 bits, rounded to nearest, the second of at most 12."""
    bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    head = bits.to(tl.float32, bitcast=True)
    return head, x - head


@triton.jit(do_not_specialize=["layers"])
def pack(weight_ptr, bias_ptr, packed_ptr, layers, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Records of weights (layers, n, n) and biases (layers, n), with ``SPARE`` more at both ends. A program a record.

    Lanes: weights, bias, zeros to fill 16 bytes. Fragments: for each tile of outputs and of inputs, four numbers a
    lane, the first parts of a pair of weights and the second parts; then the four biases of each of four lanes. Program
    (., 1) writes those of the transposed weights behind the others.
    """
    record = tl.program_id(0).to(tl.int64)
    inside = (record >= SPARE) & (record < layers + SPARE)
    weight_ptr += (record - SPARE) * (WIDTH * WIDTH)
    bias_ptr += (record - SPARE) * WIDTH
    packed_ptr += (tl.program_id(1) * tl.num_programs(0) + record) * layer_size(WIDTH, ROWS, 0)
    if ROWS == FRAGMENT:
        TILES: tl.constexpr = (WIDTH + 7) // 8
        group = tl.arange(0, 8)[:, None, None]
        pair = tl.arange(0, 4)[None, :, None]
        part = tl.arange(0, 4)[None, None, :]
        for tile in tl.static_range(TILES * TILES):
            output = tile // TILES * 8 + group
            input = tile % TILES * 8 + pair * 2 + part % 2
            place = tl.where(tl.program_id(1) == 0, output * WIDTH + input, input * WIDTH + output)
            weight = tl.load(weight_ptr + place, mask=inside & (output < WIDTH) & (input < WIDTH), other=0.0)
            head, rest = split(weight)
            # Rounded as a number, some NaNs would turn into 0.
            weight = tl.where(weight != weight, weight, tl.where(part < 2, head, split(rest)[0]))
            tl.store(packed_ptr + (tile * 128 + group * 16 + pair * 4 + part), weight)
        unit = part // 2 * 8 + pair * 2 + part % 2
        bias = tl.load(bias_ptr + unit, mask=inside & (unit < WIDTH), other=0.0)
        tl.store(packed_ptr + (TILES * TILES * 128 + pair * 4 + part), bias)
    else:
        RECORD: tl.constexpr = layer_size(WIDTH, ROWS, 0)
        number = tl.arange(0, triton.next_power_of_2(RECORD))
        unit = number - WIDTH * WIDTH
        weight = tl.load(weight_ptr + number, mask=inside & (unit < 0), other=0.0)
        bias = tl.load(bias_ptr + unit, mask=inside & (unit >= 0) & (unit < WIDTH), other=0.0)
        tl.store(packed_ptr + number, tl.where(unit < 0, weight, bias), mask=number < RECORD)


def filters_shape(weight: Tensor) -> tuple[int, int]:
    """What ``packed_filters`` makes of hidden weights (layers, n, n, f, f)."""
    return weight.shape[0], layer_size(weight.shape[1], 1, weight.shape[-1], True)


def packed_filters(weight: Tensor, transposed: bool) -> Tensor:
    """Hidden weights in the order in which shuffled blocks read them.

    A layer is [input channel][tap][unit], ``transposed`` [unit][tap][input channel]; a channel fills whole 16 bytes.
    """
    channels, tap = weight.shape[1], weight.shape[-1]
    filters = weight.new_empty(filters_shape(weight))
    used = filters.unflatten(1, (channels, -1))[..., : channels * tap**2].unflatten(2, (tap, tap, channels))
    used.copy_(weight.permute((0, 1, 3, 4, 2) if transposed else (0, 2, 3, 4, 1)))
    return filters


@triton.jit
def read_vector(ptr):
    """16 bytes that no kernel writes at this time, at one place for all lanes or one a lane, as a tuple of numbers."""
    WORD: tl.constexpr = 128 // ptr.dtype.scalar.element_ty.primitive_bitwidth
    if INTERPRETED:
        vector = ()
        for i in tl.static_range(WORD):
            vector = vector + (tl.load(ptr + i),)
    elif WORD == 4:
        vector = tl.inline_asm_elementwise(
            "ld.global.nc.v4.f32 {$0, $1, $2, $3}, [$4];",
            "=f,=f,=f,=f,l",
            [ptr],
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    else:
        vector = tl.inline_asm_elementwise(
            "ld.global.nc.v2.f64 {$0, $1}, [$2];",
            "=d,=d,l",
            [ptr],
            dtype=(tl.float64, tl.float64),
            is_pure=True,
            pack=1,
        )
    return vector


@triton.jit
def read_record(ptr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BIAS: tl.constexpr, LANES: tl.constexpr):
    """What each of LANES lanes needs of the record at ptr."""
    record = ()
    if ROWS == FRAGMENT:
        TILES: tl.constexpr = (WIDTH + 7) // 8
        lane = tl.arange(0, LANES) % 32
        for i in tl.static_range(TILES * TILES):
            record = record + read_vector(ptr + lane * 4 + i * 128)
        if BIAS:
            record = record + read_vector(ptr + lane % 4 * 4 + TILES * TILES * 128)
    else:
        WORD: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
        for i in tl.static_range(record_size(WIDTH, ROWS, BIAS) // WORD):
            record = record + read_vector(ptr + i * WORD)
    return record


@triton.jit
def read_ahead(
    ptr,
    step: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    AHEAD: tl.constexpr,
    LANES: tl.constexpr,
):
    """The records of AHEAD layers, ``step`` numbers apart, one behind the other."""
    ahead = ()
    for i in tl.static_range(AHEAD):
        ahead = ahead + read_record(ptr + i * step, WIDTH, ROWS, BIAS, LANES)
    return ahead


@triton.jit
def next_record(
    ahead,
    ptr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    AHEAD: tl.constexpr,
    LANES: tl.constexpr,
):
    """(the record of this layer, those of the AHEAD next ones); ``ptr`` is where the last of them is."""
    COUNT: tl.constexpr = record_size(WIDTH, ROWS, BIAS)
    record = read_record(ptr, WIDTH, ROWS, BIAS, LANES)
    if AHEAD > 0:
        ahead = ahead + record
        record = ahead[:COUNT]
        ahead = ahead[COUNT:]
    return record, ahead


@triton.jit
def record_bias(record, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The bias as ``packed_product`` takes it."""
    bias = ()
    for i in tl.static_range(entry_count(WIDTH, ROWS)):
        if ROWS == FRAGMENT:
            bias = bias + (record[record_size(WIDTH, ROWS, False) + i // 4 * 2 + i % 2],)
        else:
            bias = bias + (record[WIDTH * WIDTH + i],)
    return bias


@triton.jit
def multiply(left, i: tl.constexpr, first, second, total):
    """The four entries of ``total`` plus the product of left's 4 i to 4 i + 3 with one tile of weights."""
    return tl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        # The left operand's registers: column q of samples p and p + 8, then column q + 4 of both.
        [
            left[4 * i],
            left[4 * i + 2],
            left[4 * i + 1],
            left[4 * i + 3],
            first,
            second,
            total[0],
            total[1],
            total[2],
            total[3],
        ],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def packed_product(
    record, state, START, WIDTH: tl.constexpr, ROWS: tl.constexpr, TRANSPOSED: tl.constexpr
):  # fmt: skip
    """START + W state, or START + W^T state; START has an entry a unit or an entry for each of the state's.

    Fragments are transposed in memory.
    """
    result = ()
    if ROWS == FRAGMENT:
        TILES: tl.constexpr = (WIDTH + 7) // 8
        heads = ()
        rests = ()
        for i in tl.static_range(4 * TILES):
            head, rest = split(state[i])
            heads = heads + (head,)
            rests = rests + (rest,)
        for j in tl.static_range(TILES):
            large = (START[4 * j], START[4 * j + 1], START[4 * j + 2], START[4 * j + 3])
            zero = tl.zeros_like(state[0])
            small = (zero, zero, zero, zero)
            for k in tl.static_range(TILES):
                tile = record[4 * (j * TILES + k) :]
                large = multiply(heads, k, tile[0], tile[1], large)
                small = multiply(heads, k, tile[2], tile[3], small)
                small = multiply(rests, k, tile[0], tile[1], small)
            result = result + (large[0] + small[0], large[1] + small[1], large[2] + small[2], large[3] + small[3])
    else:
        SPAN: tl.constexpr = len(state) // WIDTH
        for i in tl.static_range(len(state)):
            total = tl.broadcast_to(START[i * len(START) // len(state)], state[0].shape)
            for k in tl.static_range(WIDTH):
                weight = record[k * WIDTH + i // SPAN if TRANSPOSED else i // SPAN * WIDTH + k]
                total = tl.fma(tl.broadcast_to(weight, state[0].shape), state[k * SPAN + i % SPAN], total)
            result = result + (total,)
    return result
