"""Weight gradients inside the chain: the sum of G h^T over the samples of a warp, and then over the warps.

A lane multiplies what it has of G and h, n (n + 1) products. Five times lanes then meet in pairs: each keeps half of
its sums, adds the other lane's to them and gives its other half away (recursive halving), so that about n (n + 1)
numbers go from lane to lane where a sum of each by itself would take 5 n (n + 1). The order of a sum depends on the
batch size and on how many samples a program has.
"""

# ruff: noqa: RUF005 (the kernel language has no starred tuples)
from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def sums_size(width):
    """Numbers of a layer: the gradients of its weights, then of its bias."""
    return width * (width + 1)


@triton.jit
def _meet(sums, lane, DISTANCE: tl.constexpr):
    """Half of the sums a lane, the first one in the lower of two that are DISTANCE apart; one left over in both."""
    HALF: tl.constexpr = (len(sums) + 1) // 2
    upper = lane & DISTANCE != 0
    kept = ()
    for i in tl.static_range(HALF):
        mine = sums[i]
        other = sums[i]
        if i + HALF < len(sums):
            mine = tl.where(upper, sums[i + HALF], sums[i])
            other = tl.where(upper, sums[i], sums[i + HALF])
        kept = kept + (mine + tl.gather(other, lane ^ DISTANCE, 0),)
    return kept


@triton.jit
def _lane_sums(g, h, WIDTH: tl.constexpr):
    """Sums over a lane's samples of G h^T and of G."""
    SPAN: tl.constexpr = len(g) // WIDTH
    sums = ()
    for i in tl.static_range(WIDTH):
        for k in tl.static_range(WIDTH):
            total = g[i * SPAN] * h[k * SPAN]
            for s in tl.static_range(1, SPAN):
                total = tl.fma(g[i * SPAN + s], h[k * SPAN + s], total)
            sums = sums + (total,)
    for i in tl.static_range(WIDTH):
        total = g[i * SPAN]
        for s in tl.static_range(1, SPAN):
            total = total + g[i * SPAN + s]
        sums = sums + (total,)
    return sums


@triton.jit
def warp_sums(g, h, WIDTH: tl.constexpr):
    """Sums over a warp of G h^T, (n, n), and of G, (n), one a lane; states as ROWS = 1 has them, n at most 4."""
    sums = _lane_sums(g, h, WIDTH)
    lane = tl.arange(0, 32)
    for step in tl.static_range(5):
        sums = _meet(sums, lane, 16 >> step)
    return sums[0]


@triton.constexpr_function
def _left(count, distance):
    """Sums before the meeting of lanes that are ``distance`` apart."""
    return -(-count * distance // 16)


@triton.jit
def _number_of_lane(lane, COUNT: tl.constexpr):
    """(which of COUNT sums a lane has in the end, whether it is the one that writes it)."""
    number = tl.zeros_like(lane)
    owner = lane >= 0
    for step in tl.static_range(5):
        upper = lane & (1 << step) != 0
        half = (_left(COUNT, 1 << step) + 1) // 2
        there = number + half < _left(COUNT, 1 << step)
        owner = owner & (there | ~upper)
        number = tl.where(upper & there, number + half, number)
    return number, owner


@triton.jit
def write_sums(ptr, sums, enabled, WIDTH: tl.constexpr):
    """What lanes have of ``warp_sums``, in order."""
    number, owner = _number_of_lane(tl.arange(0, 32), sums_size(WIDTH))
    tl.store(ptr + number, sums, mask=owner & enabled)


@triton.jit(do_not_specialize=["layers", "programs"])
def add_sums(partial_ptr, weight_ptr, bias_ptr, layers, programs, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(programs, layers, n (n + 1)) of ``write_sums`` to gradients (layers, n, n) and (layers, n)."""
    COUNT: tl.constexpr = sums_size(WIDTH)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    numbers = layers.to(tl.int64) * COUNT
    total = tl.zeros((BLOCK,), tl.float64)  # programs may be many
    for _ in tl.range(0, programs, loop_unroll_factor=8):
        total += tl.load(partial_ptr + place, mask=place < numbers, other=0.0).to(tl.float64)
        partial_ptr += numbers
    layer = place // COUNT
    number = place % COUNT
    inside = place < numbers
    tl.store(weight_ptr + layer * (WIDTH * WIDTH) + number, total, mask=inside & (number < WIDTH * WIDTH))
    tl.store(bias_ptr + layer * WIDTH + (number - WIDTH * WIDTH), total, mask=inside & (number >= WIDTH * WIDTH))
