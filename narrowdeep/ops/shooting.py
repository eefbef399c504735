"""Depth in parallel (multiple shooting) in plain torch: what the kernels of ``triton_shooting.py`` compute.

A chain is cut into segments that run side by side, each from a guess of the state it starts from: at first, that of the
whole chain. A solve along the boundaries then gives better starts, and all segments run again, until they meet
(Bock and Plitt 1984; Gander and Vandewalle 2007 for what an approximate Jacobian does to it).

How the end of a segment follows its start: in offset form a layer leaves a unit as it is (``skip``) but for what all
units together add, which is smaller by about C_L. So a change of a unit's start goes through to its end, and what it
does to the other units is left to the next turn, which divides that error by about C_L again. The exception is a unit
that a ReLU holds at 0. There a segment is x -> max(x + a, b) as long as what is added stays the same: the unit follows
its start only from where the ReLU would not have lifted it. Layers add up how far they lift a unit (``pushed``), and

    change of the end = change of the start                   where pushed = 0
                        max(0, change of the start - pushed)  elsewhere

A turn's results count where no start of a sample would change by more than ``BOUND`` of the largest movement (hi + lo)
of its states; the middle unit, which a layer does not skip, may be off by ``MIDDLE_BOUND`` of the largest unit, as it
enters a single layer. Samples that need more than ``PASSES`` turns go through the chain one layer at a time. So results
are those of the chain, up to rounding.

The gradient is linear once states are known: a segment multiplies it by a matrix n x n, whose columns are the gradients
of unit vectors, all of them side by side. Their product from the top gives G at all boundaries, exactly.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from narrowdeep.ops.params import Affine
from narrowdeep.ops.reference import RENORMALISE_PERIOD, LinearMap, renormalise, skip_mask, skipped, step

BOUND = {torch.float32: 2.0**-22, torch.float64: 1e-12}
"""Largest change of a start that counts as none, relative to how far the sample's states move along the chain."""

MIDDLE_BOUND = {dtype: 64 * bound for dtype, bound in BOUND.items()}
"""The same of the middle unit, relative to the largest unit: its rounding is that of C_L."""

PASSES = {torch.float32: 6, torch.float64: 8}
"""Turns at most. New networks need two; trained ones, with L = 2050 and C_L from 100 to L, 3 to 5 and 5 to 8."""


class Shot(NamedTuple):
    """(hi, lo) of the last state; turns that each sample took, 0 where it went through the chain in order."""

    hi: Tensor
    lo: Tensor
    turns: Tensor


def segments(start: int, layers: int, length: int) -> list[tuple[int, int]]:
    """(first, last) state of each segment, numbered as in the network; boundaries are multiples of ``length``."""
    cuts = [start, *range((start // length + 1) * length, start + layers, length), start + layers]
    return list(pairwise(cuts))


def forward(
    affine: LinearMap,
    state: tuple[Tensor, Tensor, Tensor],
    hidden: Affine,
    outputs: int,
    length: int,
    start: int = 0,
    passes: int | None = None,
) -> Shot:
    """Hidden layers (offset form) from a state (base, hi, lo), each (n, B), in segments of ``length`` layers.

    ``length`` is a multiple of RENORMALISE_PERIOD; ``start`` is the number of the state; ``passes`` turns at most.
    """
    base, hi, lo = state
    parts = segments(start, len(hidden.weight), length)
    starts = [(hi, lo)] * len(parts)
    result = Shot(hi, lo, torch.zeros(lo.shape[-1], dtype=torch.int64))
    for turn in range(1, 1 + (PASSES[lo.dtype] if passes is None else passes)):
        ends = [
            _run(affine, base, *begin, hidden, outputs, start, *part) for begin, part in zip(starts, parts, strict=True)
        ]
        starts, met = _join(base, starts, ends, outputs)
        fresh = met & (result.turns == 0)
        result = Shot(
            torch.where(fresh, ends[-1][0], result.hi),
            torch.where(fresh, ends[-1][1], result.lo),
            torch.where(fresh, turn, result.turns),
        )
    hi, lo, _ = _run(affine, base, hi, lo, hidden, outputs, start, start, parts[-1][1])
    left = result.turns == 0
    return Shot(torch.where(left, hi, result.hi), torch.where(left, lo, result.lo), result.turns)


def _run(
    affine: LinearMap,
    base: Tensor,
    hi: Tensor,
    lo: Tensor,
    hidden: Affine,
    outputs: int,
    start: int,
    first: int,
    last: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(hi, lo) of state ``last`` from that of state ``first``, and ``pushed``."""
    skip, pushed = skip_mask(lo, outputs, True), torch.zeros_like(lo)
    for number in range(first, last):
        weight, bias = hidden.weight[number - start], hidden.bias[number - start]
        z = skipped(skip, lo) + (affine(weight, (base + hi) + lo) + bias[:, None])
        lo = step(affine, skip, base, hi, lo, weight, bias)
        pushed = pushed + (lo - z)
        if (number + 1) % RENORMALISE_PERIOD == 0:
            hi, lo = renormalise(base, hi, lo, skip)
    return hi, lo, pushed


def _join(
    base: Tensor, starts: list[tuple[Tensor, Tensor]], ends: list[tuple[Tensor, Tensor, Tensor]], outputs: int
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """New starts, and which samples' segments meet as they are."""
    skip = skip_mask(base, outputs, True)
    zero = torch.zeros_like(base)
    new, changes, sizes = [starts[0]], [zero], [zero]
    middles, wholes = [zero], [zero]
    change = zero
    for i, (hi, lo, pushed) in enumerate(ends):
        change = torch.where(pushed > 0, (change - pushed).clamp(min=0), change)
        changes.append(change)
        if i + 1 == len(ends):
            break
        old_hi, old_lo = starts[i + 1]
        gap = (hi - old_hi) + (lo - old_lo)
        sizes.append(skipped(skip, hi + lo))
        wholes.append((base + hi) + lo)
        middles.append(torch.where(skip, zero, gap))
        new.append(renormalise(base, hi, torch.maximum(lo + change, -(base + hi)), skip))
        change = skipped(skip, torch.maximum(gap + change, -((base + old_hi) + old_lo)))
        changes.append(change)
    most = [torch.stack(values).abs().amax((0, 1)) for values in (changes, sizes, middles, wholes)]
    near = (most[0] <= BOUND[base.dtype] * most[1]) & (most[2] <= MIDDLE_BOUND[base.dtype] * most[3])
    return new, near & torch.stack(most).sum(0).isfinite()


def transposed_jacobian(weight: Tensor, h: Tensor) -> Tensor:
    """(n, n, B), column by column the gradients of unit vectors: of layers with whole weights W, (layers, n, n), and
    states before them, (layers, n, B)."""
    columns = torch.eye(weight.shape[1], dtype=weight.dtype)[:, :, None].expand(-1, -1, h.shape[-1])
    for w, state in zip(weight.flip(0), h.flip(0), strict=True):
        columns = torch.where(state[:, None] > 0, torch.einsum("ki,kcb->icb", w, columns), 0.0)
    return columns
