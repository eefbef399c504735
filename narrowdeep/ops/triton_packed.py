"""A hidden layer's weights and bias in one record of memory, for the kernels that hold one sample a lane.

Every lane needs every weight. A load brings 16 bytes, and the records of the next layers are asked for before the
present one is used: few warps are there to hide a load behind.
"""

# ruff: noqa: RUF005 (the kernel language has no starred tuples)
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = tl.constexpr(knobs.runtime.interpret)
"""The interpreter knows no inline assembly."""

SPARE = tl.constexpr(2)
"""Records of zeros at both ends, so that a chain reads ahead, at most as many, without asking where it ends."""

PACK = 1024
"""Numbers that a program of ``pack`` writes."""


@triton.constexpr_function
def layer_size(width, rows, tap):
    """Numbers from a hidden layer to the next: a record is weights (n, n), bias (n,) and zeros to fill 16 bytes."""
    if tap:
        return (width * tap) ** 2
    return width * width if rows != 1 else (width * (width + 1) + 3) // 4 * 4


@triton.constexpr_function
def spare_layers(rows, tap):
    """Records before the first layer: ``SPARE`` if there are records."""
    return 0 if tap or rows > 1 else SPARE.value


@triton.jit(do_not_specialize=["layers"])
def pack(weight_ptr, bias_ptr, packed_ptr, layers, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Records of weights (layers, n, n) and biases (layers, n), with ``SPARE`` more before and behind."""
    RECORD: tl.constexpr = layer_size(WIDTH, 1, 0)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    layer = place // RECORD - SPARE
    number = place % RECORD
    inside = (layer >= 0) & (layer < layers)
    is_weight = number < WIDTH * WIDTH
    weight = tl.load(weight_ptr + layer * (WIDTH * WIDTH) + number, mask=inside & is_weight, other=0.0)
    unit = number - WIDTH * WIDTH
    bias = tl.load(bias_ptr + layer * WIDTH + unit, mask=inside & (unit >= 0) & (unit < WIDTH), other=0.0)
    tl.store(packed_ptr + place, tl.where(is_weight, weight, bias), mask=place < (layers + 2 * SPARE) * RECORD)


def packed_shape(weight: Tensor) -> tuple[int, int]:
    """What ``pack`` makes of hidden weights (layers, n, n)."""
    return weight.shape[0] + 2 * SPARE.value, layer_size(weight.shape[1], 1, 0)


@triton.jit
def read_vector(ptr):
    """16 bytes that no kernel writes at this time, the same for all lanes, as a tuple of numbers."""
    WORD: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
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
def read_record(ptr, COUNT: tl.constexpr):
    """The first COUNT numbers of a record, a multiple of what 16 bytes hold."""
    WORD: tl.constexpr = 128 // ptr.dtype.element_ty.primitive_bitwidth
    record = ()
    for i in tl.static_range(COUNT // WORD):
        record = record + read_vector(ptr + i * WORD)
    return record


@triton.jit
def read_ahead(ptr, step: tl.constexpr, COUNT: tl.constexpr, AHEAD: tl.constexpr):
    """COUNT numbers of each of AHEAD records, ``step`` numbers apart, one behind the other."""
    ahead = ()
    for i in tl.static_range(AHEAD):
        ahead = ahead + read_record(ptr + i * step, COUNT)
    return ahead


@triton.jit
def next_record(ahead, ptr, COUNT: tl.constexpr, AHEAD: tl.constexpr):
    """(the record of this layer, those of the AHEAD next ones); ``ptr`` is where the last of them is."""
    record = read_record(ptr, COUNT)
    if AHEAD > 0:
        ahead = ahead + record
        record = ahead[:COUNT]
        ahead = ahead[COUNT:]
    return record, ahead


@triton.jit
def packed_product(record, state, START, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr):
    """START + W state, or START + W^T state; START is a tuple of entries or of scalars."""
    result = ()
    for i in tl.static_range(WIDTH):
        total = tl.broadcast_to(START[i], state[0].shape)
        for k in tl.static_range(WIDTH):
            weight = record[k * WIDTH + i if TRANSPOSED else i * WIDTH + k]
            total = tl.fma(tl.broadcast_to(weight, state[k].shape), state[k], total)
        result = result + (total,)
    return result
