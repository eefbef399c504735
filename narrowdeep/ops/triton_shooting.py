"""Depth in parallel on a GPU: segments of a chain side by side, and the small solves between them.

``narrowdeep.ops.shooting`` has the algorithm. Small batches leave most of a GPU empty while a chain goes from layer to
layer; here a program is a block of samples in one segment. States (offset form): ``chain_segments`` and ``join_states``
take turns, a fixed number of times; a block of samples whose segments meet is left alone by all later launches, and
``chain_sequential`` runs what is left by then as one chain. The host reads nothing. Gradients (both forms):
``backward_segments`` takes the unit vectors through every segment, which gives its transposed Jacobian;
``join_gradients`` multiplies them from the top; ``backward_segments`` follows G through all segments. That is exact.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from narrowdeep.ops import triton_common
from narrowdeep.ops.reference import RENORMALISE_PERIOD
from narrowdeep.ops.shooting import BOUND, MIDDLE_BOUND, PASSES
from narrowdeep.ops.triton_common import Block, empty, launch
from narrowdeep.ops.triton_dispatch import spares
from narrowdeep.ops.triton_jacobians import backward_segments, join_gradients
from narrowdeep.ops.triton_segments import chain_segments, chain_sequential, join_states

if TYPE_CHECKING:
    from narrowdeep.ops.triton_chain import Family, Span

WIDEST = 8
"""Widest layer whose depth is taken in parallel: past it the unit vectors of a Jacobian alone fill the device."""

LEAST_SCALE = 64.0
"""Smallest C_L of such a forward: every turn divides by it what units do to each other beside the identity part."""

LEAST_LAYERS = {"forward": 2048, "backward": 384}
"""Fewest layers of a call, or of a group of the backward, that are worth the launches."""

LEAST_SEGMENTS = {"forward": 16, "backward": 4}
"""A forward takes four turns or so and may be in vain, a backward goes through them twice: fewer do not pay."""

RESIDENT = 8
"""Programs a multiprocessor: with more, segments wait for each other."""

MOST_SEGMENTS = 128
"""Of a call: what ``join_states`` takes at once."""

_JOINED = 1024
"""Entries of a program of ``join_states``, four a lane: fewer read less of a sector at a time, more take longer."""

_JOIN_GRADIENTS = {"num_warps": 1, "registers": 255}


def widest(kernel: str, dtype: torch.dtype, target: int) -> int:
    """Widest layer whose depth ``kernel`` takes in parallel on sm_``target``."""
    # There the unit vectors of wider layers spill.
    return 4 if kernel == "backward" and dtype == torch.float64 and 80 <= target < 90 else WIDEST


def limits() -> dict[str, str]:
    """Of forward and backward, in words: what is taken with segments side by side."""
    most = {kernel: RESIDENT * 32 // least for kernel, least in LEAST_SEGMENTS.items()}
    halves = "a multiprocessor (half as many of widths 5 to 8 on tensor cores)"
    return {
        "forward": f"offset form, width <= {WIDEST}, scale >= {LEAST_SCALE:g}, {LEAST_LAYERS['forward']} hidden layers "
        f"or more, up to {most['forward']} samples {halves}; in order where segments do not meet",
        "backward": f"width <= {WIDEST} (float64 on sm_80 to 89: 4), {LEAST_LAYERS['backward']} layers or more at a "
        f"time, up to {most['backward']} / width samples {halves}",
    }


def segment_length(kernel: str, family: Family, x: Tensor, weight: Tensor, offset: bool, layers: int) -> int:
    """Layers of a segment, a multiple of RENORMALISE_PERIOD; 0 where ``layers`` are taken one after another.

    ``kernel`` is forward or backward, the rest as ``triton_chain.Family`` has it; shapes and device decide.
    """
    most = widest(kernel, x.dtype, triton_common.capability(x.device))
    if weight.dim() > 3 or weight.shape[1] > most or layers < LEAST_LAYERS[kernel] or spares(x.device):
        return 0
    programs = triton.cdiv(x.shape[0], family.blocks(kernel, x, weight, offset)[-1].samples)
    programs *= weight.shape[1] if kernel == "backward" else 1
    most = min(MOST_SEGMENTS - 1, RESIDENT * triton_common.multiprocessors(x.device) // programs)
    if most < LEAST_SEGMENTS[kernel]:
        return 0
    # A boundary of the gradient's solve takes as long as a layer or so.
    least = layers**0.5 if kernel == "backward" else 1
    return triton.cdiv(math.ceil(max(least, layers / most)), RENORMALISE_PERIOD) * RENORMALISE_PERIOD


def _length(these: Span, kernel: str, layers: int) -> tuple[int, Block]:
    """``segment_length``, and the block of samples that its programs have."""
    given = these.x, these.hidden[0], these.middle >= 0
    return segment_length(kernel, these.family, *given, layers), these.family.blocks(kernel, *given)[-1]


def forward(
    these: Span, state: tuple[Tensor, Tensor, Tensor], saved: Tensor, final: Tensor, segment: int, scale: float
) -> bool:
    """What ``chain_forward`` writes to ``saved`` and ``final``, or nothing: False where it is to do that.

    ``segment`` and ``scale`` as the op has them.
    """
    layers = these.layers
    length, block = _length(these, "forward", layers)
    if not length or these.middle < 0 or scale < LEAST_SCALE:
        return False
    (base, hi, lo), (width, batch) = state, state[2].shape
    count, blocks = triton.cdiv(these.phase + layers, length), triton.cdiv(batch, block.samples)
    join = joining("forward", block, width, lo.dtype, count)
    parts = block.samples // join["BLOCK"]
    ends, pushed = empty(lo, count, 2, width, batch), empty(lo, count, width, batch)
    starts, failed = empty(lo, count - 1, 2, width, batch), empty(lo, blocks * parts)
    join |= {"MIDDLE": these.middle, "WIDTH": width}
    how: dict[str, Any] = {"block": block, "SAVE": min(segment, 2), "PARTS": parts}
    weight = these.weights("forward")[0]
    numbers = layers, segment if segment > 1 else layers, these.phase
    out = saved if segment else final, final
    for turn in range(PASSES[lo.dtype]):
        before = (starts, failed) if turn else (ends, pushed)  # not read in turn 0
        tensors = base, hi, lo, weight, *before, *out, ends, pushed
        these.run(chain_segments, "forward", tensors, (*numbers, length, turn), count, **how)
        joined = base, hi, lo, ends, pushed, starts, failed
        launch(join_states, (blocks * parts,), *joined, batch, count, turn, **join)
    these.run(chain_sequential, "forward", (failed, base, hi, lo, weight, *out), numbers, **how)
    return True


def backward(
    these: Span,
    grad: tuple[Tensor, Tensor, Tensor],
    h: Tensor,
    g: Tensor,
    layers: tuple[int, int],
    masked: int,
    store: bool,
) -> Tensor | None:
    """What ``chain_backward`` makes of G of state ``layers[1]``: that of state ``layers[0]``; ``g`` if ``store``.

    None, and nothing is done, where ``chain_backward`` is to do that.
    """
    length, block = _length(these, "backward", layers[1] - layers[0])
    if not length:
        return None
    (first, last), (width, batch), phase = layers, grad[2].shape, these.phase
    shapes = backward_shapes(block, width, batch, these.words, (phase + first, phase + last), length)
    scratch, columns, tops, results = (empty(h, *shape) for shape in shapes)
    count, blocks = len(results), triton.cdiv(batch, block.samples)
    weight = these.weights("backward")[0]
    numbers = these.layers, phase, first, last, length
    given = grad[0], grad[0], weight, h, scratch, h, columns  # what is not read or written: the second, the sixth
    how: dict[str, Any] = {"block": block, "JACOBIAN": True, "STORE": False}
    these.run(backward_segments, "backward", given, numbers, (count - 1) * width, **how)
    join = joining("backward", block, width, h.dtype, count) | {"MIDDLE": these.middle, "WIDTH": width}
    ends = batch, phase, first, last, length, count, masked
    launch(join_gradients, (blocks,), *grad, h, columns, tops, *ends, **join)
    given = grad[0], tops, weight, h, results, g, columns
    how |= {"JACOBIAN": False, "STORE": store}
    these.run(backward_segments, "backward", given, numbers, count, **how)
    return results[0]


def workspace(family: Family, x: Tensor, weight: Tensor, offset: bool, layers: int) -> int:
    """Most numbers that ``backward`` needs beside h and g of so many layers, where ``segment_length`` has it run."""
    length = segment_length("backward", family, x, weight, offset, layers)
    if not length:
        return 0
    block = family.blocks("backward", x, weight, offset)[-1]
    numbers = length - 1, length - 1 + layers  # as many segments as they can touch
    shapes = backward_shapes(block, weight.shape[1], x.shape[0], 3 if offset else 1, numbers, length)
    return sum(math.prod(shape) for shape in shapes)


def joining(kernel: str, block: Block, width: int, dtype: torch.dtype, count: int) -> dict[str, Any]:
    """How what joins ``count`` segments of ``kernel`` is launched, forward or backward, which run with ``block``."""
    double = dtype.itemsize // 4
    if kernel == "backward":
        return {"BLOCK": block.samples, "GROUP": max(1, min(4, 64 // width**2 // double)), **_JOIN_GRADIENTS}
    segments = triton.next_power_of_2(count)
    samples = min(block.samples, max(1, _JOINED // (segments * triton.next_power_of_2(width))))
    bounds = {"BOUND": BOUND[dtype], "MIDDLE_BOUND": MIDDLE_BOUND[dtype]}
    return {"BLOCK": samples, "SEGMENTS": segments, "num_warps": 8, **bounds}


def backward_shapes(
    block: Block, width: int, batch: int, words: int, numbers: tuple[int, int], length: int
) -> list[tuple[int, ...]]:
    """Shapes of what ``backward`` needs between two states of these numbers, counted as ``phase`` is."""
    count = triton.cdiv(numbers[1], length) - numbers[0] // length
    return [
        (count - 1, width, words, width, batch),
        (count - 1, triton.cdiv(batch, block.samples), width, width, block.samples),
        (count, max(1, words - 1), width, batch),
        (count, words, width, batch),
    ]
