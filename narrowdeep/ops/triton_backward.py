"""The backward of a span on a GPU: a group of layers at a time in three kernels, or many segments in one launch."""

from __future__ import annotations

import math
from typing import Any

import triton
from torch import Tensor

from narrowdeep.ops import layered, triton_chain, triton_shooting
from narrowdeep.ops.params import BackwardArgs
from narrowdeep.ops.triton_chain import Descent, Family, layers_a_group, packed_shape, padded, samples, words
from narrowdeep.ops.triton_common import Block, empty, fitting_block, launch, scratch_bytes
from narrowdeep.ops.triton_kernels import chain_recompute
from narrowdeep.ops.triton_packed import filters_shape
from narrowdeep.ops.triton_sums import add_sums, sums_size
from narrowdeep.ops.triton_whole import chain_whole

ADDED = 128
"""Numbers that a program of ``add_sums`` adds."""


def workspace(family: Family, x: Tensor, weight: Tensor, offset: bool, segment: int) -> int | None:
    """Bytes that ``backward`` takes for the weights as it reads them and for a group of layers; None: one at a time.

    Only shape, dtype and device of x and of the hidden weights are read; ``segment`` is at least 1.
    """
    if not family.supported("backward", x, weight):
        return None
    layers, width = weight.shape[:2]
    state = x.new_empty(width, *x.shape[2:], x.shape[0], device="meta")
    records = math.prod(packed_shape(family, "backward", x, weight, offset) or (0,))
    if family.supported("whole", x, weight):
        _, programs, step = shares(family, x, weight, offset, segment)
        states = (min(segment, layers) + 1) * state.numel() if segment > 1 else 0
        return (states + programs * min(step, layers) * sums_size(width) + records) * x.element_size()
    step = layers_a_group(state, segment, x.device)

    def scratch(kernel: str, segments: int) -> int:
        block = fitting_block(family.blocks(kernel, x, weight, offset), x.shape[0] * segments, x.device)
        return math.prod(padded(x, weight, block, segments) or (0,))

    def filters(kernel: str) -> int:
        shuffled = family.blocks(kernel, x, weight, offset)[0].shuffled
        return math.prod(filters_shape(weight)) if shuffled else 0

    def group(count: int, states: int) -> int:
        backward = count * state.numel() + scratch("backward", 1)
        backward += triton_shooting.workspace(family, x, weight, offset, count)
        if segment == 1:
            return backward
        return states * state.numel() + max(backward, scratch("recompute", triton.cdiv(count, segment)))

    top = (layers - 1) % step + 1  # the first group has the very last state too
    most = max(group(top, top + 1), group(step, step) if layers > step else 0)
    records += filters("backward") + (filters("recompute") if segment > 1 else 0)
    return (most + records) * x.element_size()


def shares(family: Family, x: Tensor, weight: Tensor, offset: bool, segment: int) -> tuple[Block, int, int]:
    """(the block, programs, layers a launch) of ``chain_whole``: as many as have room for the programs' sums."""
    block = fitting_block(family.blocks("whole", x, weight, offset), x.shape[0], x.device)
    programs = triton.cdiv(x.shape[0], block.samples)
    bytes_a_segment = segment * programs * sums_size(weight.shape[1]) * x.element_size()
    return block, programs, max(1, 2 * scratch_bytes(x.device) // bytes_a_segment) * segment


def _in_one_launch(descent: Descent, grad: Tensor, grads: list[Tensor]) -> None:
    """What ``Descent.groups`` does and the sums over its groups, to ``grads`` if there are any, by ``chain_whole``."""
    these, states, given = descent.span()
    saved, layers, segment, end = states[-1], these.layers, descent.segment, descent.params.last
    shape, weight, offset = saved.shape[2:], these.hidden[0], these.middle >= 0
    block, programs, step = shares(these.family, these.x, weight, offset, segment)
    again, known = segment > 1, layers
    room = empty(saved, min(segment, layers) + 1, *shape) if again else saved
    top = saved[-1, 0] if len(saved) else saved
    if again and end is not None:  # the last state is needed before
        known = (layers - 1) // segment * segment
        h = room[: layers - known + 1]
        tensors: tuple[Tensor, ...] = (*states, *these.weights("recompute"), h)
        these.run(chain_recompute, "recompute", tensors, (layers, segment, these.phase, known // segment, given))
        top = h[-1]
    bounds = list(range(0, layers, step if grads else layers))
    if given and not again:  # the state that came in was not saved again: a layer by itself
        bounds = sorted({1 % layers, *bounds})
    numbers_of_layer = programs * sums_size(weight.shape[1])
    sums_room = empty(saved, numbers_of_layer * min(step, layers) if grads else 0)
    for first, last in reversed(list(zip(bounds, [*bounds[1:], layers], strict=True))):
        masked = int(last < layers or end is None)
        if again:
            h = room[: min(segment, last - first) + 1 - masked]
        elif given and first == 0:
            h = descent.first_states(states, last - masked)
        else:
            h = saved[first - given :, 0]
        before = words(descent.gradient) if descent.gradient is not None else descent.above(grad, top)
        descent.gradient = empty(saved, these.words, *shape)
        sums = sums_room[: numbers_of_layer * (last - first)] if grads else h
        tensors = (*before, *states, *these.weights("whole"), h, descent.gradient, sums)
        numbers = (layers, segment if again else layers, these.phase, first, last, masked, given, known)
        these.run(chain_whole, "whole", tensors, numbers, block=block, RECOMPUTE=again, SUM=bool(grads))
        if grads:
            grid = (triton.cdiv(sums.numel() // programs, ADDED),)
            parts = (g[first:last] for g in grads)
            constants = {"WIDTH": weight.shape[1], "BLOCK": ADDED}
            launch(add_sums, grid, sums, *parts, last - first, programs, num_warps=4, **constants)


def backward(family: Family, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of the input and the six parameters of a span; with segment 0 the forward runs again first."""
    grad, input, params, saved, settings, segment, need_input, need_params = BackwardArgs.of(args)
    if not family.supported("backward", samples(input, params.first), params.hidden.weight):
        return layered.backward(family.layer, *args)
    if segment == 0:
        segment = max(2, round(params.layers**0.5))
        saved = triton_chain.forward(family, input, *params.flat(), *settings, segment)[1]
    grads = [input.new_empty(0 if p is None or not need_params else p.shape) for p in params.flat()]
    step = layers_a_group(input.new_empty(saved.shape[2:], device="meta"), segment, input.device)
    descent = Descent(family, input, params, saved, settings, segment, step)
    if family.supported("whole", samples(input, params.first), params.hidden.weight):
        _in_one_launch(descent, grad, grads[2:4] if need_params else [])
    else:
        for begin, end, h, g in descent.groups(grad, need_params):
            if need_params:
                family.sum_weight_gradients(g, h, grads[2][begin:end], grads[3][begin:end])
            del h, g  # before those of the next group are made
    if need_params and params.last is not None:
        assert descent.r is not None
        assert descent.h_last is not None
        layered.last_gradients(family.layer, descent.r, descent.h_last, grads[4:])
    if params.first is None:
        assert descent.gradient is not None
        return descent.gradient if need_input else input.new_empty(0), *grads
    ends = params.first.weight, grads[:2] if need_params else [], settings.scale, settings.offset
    return layered.first_gradients(family.layer, descent.full(), input.movedim(0, -1), *ends, need_input), *grads
