"""What starts the Triton kernels of a span (``triton_kernels.py``): blocks, scratch memory, groups of segments.

Where kernels do not reach, ``layered.py`` takes their place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from narrowdeep.ops import layered, triton_shooting
from narrowdeep.ops.params import Affine, ChainParams, ChainSettings, ChainTangents, ForwardArgs, JvpArgs
from narrowdeep.ops.reference import RENORMALISE_PERIOD, saved_shape
from narrowdeep.ops.triton_common import FRAGMENT, Block, choose_block, empty, launch, scratch_bytes
from narrowdeep.ops.triton_kernels import chain_backward, chain_forward, chain_recompute
from narrowdeep.ops.triton_packed import SPARE, is_packed, layer_size, pack, packed_filters
from narrowdeep.ops.triton_tangents import chain_jvp

PACKED = ("forward", "recompute", "backward", "whole")
"""Kernels that read an MLP's hidden layers as records (``triton_packed.py``), tiles excepted."""

MOST_SEGMENTS = 65_535
"""Of a group: CUDA's limit for the second dimension of a grid."""


@dataclass(frozen=True)
class Family:
    """What the MLP and the convolution chain differ in on a GPU. ``kernel`` is forward, recompute, backward, whole (a
    backward in one launch), jvp, tangents or backward_jvp.

    ``x`` stands for the samples of a call: (B, any, *positions), of which shape, dtype and device are read.
    """

    layer: layered.Layer
    supported: Callable[[str, Tensor, Tensor], bool]
    """(kernel, x, hidden_weight): the rest runs one layer at a time"""
    blocks: Callable[[str, Tensor, Tensor, bool], list[Block]]
    """(kernel, x, hidden_weight, offset): blocks of samples to choose from, best instruction mix first"""
    constants: Callable[[str, Tensor, Tensor], dict[str, Any]]
    """(kernel, x, hidden_weight): ROWS, TAP, HEIGHT, LENGTH and PREFETCH"""
    sum_weight_gradients: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    """(g, h, weight_grad, bias_grad): some layers' (layers, n, *positions, B) to (layers, n, n, ...), (layers, n)"""


def constants(family: Family, kernel: str, x: Tensor, weight: Tensor, middle: int, block: Block) -> dict[str, Any]:
    """Every constant of a chain kernel but its own; ``middle`` is -1 in plain form."""
    values = {
        "MIDDLE": middle,
        "WIDTH": weight.shape[1],
        "BLOCK": block.samples,
        "ALIGNED": x.shape[0] % 4 == 0,
    } | family.constants(kernel, x, weight)
    if kernel in PACKED:
        values["AHEAD"] = block.ahead
    return values | {"ROWS": FRAGMENT.value} if block.fragments else values


def packed_shape(family: Family, kernel: str, x: Tensor, weight: Tensor, offset: bool) -> tuple[int, ...] | None:
    """(orders, layers and spare ones, numbers of a record) of the records that a call reads, None where it reads none.

    A ``kernel`` backward, with recompute, has its own order behind the forward's where that makes a difference.
    """
    block = family.blocks(kernel, x, weight, offset)[0]
    values = constants(family, kernel, x, weight, 0 if offset else -1, block)
    rows, tap = values["ROWS"], values["TAP"]
    if not is_packed(rows, tap):
        return None
    orders = 2 if block.fragments and kernel == "backward" else 1
    return orders, weight.shape[0] + 2 * SPARE.value, layer_size(weight.shape[1], rows, tap)


def padded(x: Tensor, weight: Tensor, block: Block, segments: int) -> tuple[int, ...] | None:
    """Shape of a convolution's scratch memory: two padded states a program, unless images fit a warp."""
    if x.dim() < 4 or block.shuffled:
        return None
    border = weight.shape[-1] // 2 * 2
    plane = (x.shape[2] + border) * (x.shape[3] + border) * block.samples
    return triton.cdiv(x.shape[0], block.samples) * segments, 2, weight.shape[1], plane


@dataclass(frozen=True)
class Span:
    """What every kernel of a call needs; ``hidden`` are the contiguous hidden weights and biases."""

    family: Family
    x: Tensor
    """As ``Family`` takes it."""
    hidden: tuple[Tensor, Tensor]
    middle: int
    """Number of the middle unit, -1 in plain form."""
    phase: int
    """Number of the first state, modulo RENORMALISE_PERIOD."""
    reader: str
    """The kernel that records are for, see ``packed_shape``; "" if none reads any."""
    filters: dict[bool, Tensor] = field(default_factory=dict)
    """transposed -> hidden weights as ``packed_filters`` makes them, once they were asked for."""

    @property
    def layers(self) -> int:
        return self.hidden[0].shape[0]

    @property
    def words(self) -> int:
        """Of a state: base, hi and lo, or lo alone in plain form."""
        return 1 if self.middle < 0 else 3

    @functools.cached_property
    def records(self) -> Tensor | None:
        """The hidden layers as ``triton_packed.py`` has them; None where ``reader`` takes them as they are."""
        weight, bias = self.hidden
        offset = self.middle >= 0
        shape = packed_shape(self.family, self.reader, self.x, weight, offset) if self.reader else None
        if shape is None:
            return None
        records = empty(weight, *shape)
        rows = FRAGMENT.value if self.family.blocks(self.reader, self.x, weight, offset)[0].fragments else 1
        grid = (shape[1], shape[0])
        launch(pack, grid, weight, bias, records, self.layers, num_warps=1, WIDTH=weight.shape[1], ROWS=rows)
        return records

    def weights(self, kernel: str) -> tuple[Tensor, Tensor]:
        """Hidden weights and biases as a kernel reads them."""
        weight, bias = self.hidden
        return weight if self.records is None else self.records[-1 if kernel == "backward" else 0], bias

    def tangents(self, given: ChainTangents) -> tuple[list[Tensor], dict[str, Any]]:
        """Those of the hidden weights and biases, something else where there are none, and what says so to a kernel."""
        tensors = [h if t is None else t.contiguous() for h, t in zip(self.hidden, given.hidden, strict=True)]
        return tensors, {"HAS_WEIGHT_T": given.hidden_weight is not None, "HAS_BIAS_T": given.hidden_bias is not None}

    def packed_filters(self, weight: Tensor, transposed: bool) -> Tensor:
        """``packed_filters``, of the hidden weights once a call."""
        if weight is not self.hidden[0]:
            return packed_filters(weight, transposed)
        if transposed not in self.filters:
            self.filters[transposed] = packed_filters(weight, transposed)
        return self.filters[transposed]

    def run(
        self,
        kernel: Any,
        name: str,
        tensors: tuple[Tensor, ...],
        numbers: tuple[int, ...],
        segments: int = 1,
        block: Block | None = None,
        **more: Any,
    ) -> None:
        """Launch over the batch (and ``segments``) with the block given or the one that fits."""
        x, weight, offset, batch = self.x, self.hidden[0], self.middle >= 0, self.x.shape[0]

        def start(block: Block) -> None:
            grid = (triton.cdiv(batch, block.samples), segments)
            shape = padded(x, weight, block, segments)
            scratch = None if shape is None else x.new_zeros(shape)
            given = tensors
            if block.shuffled:
                transposed = name.startswith("backward")
                named = zip(kernel.arg_names, tensors, strict=False)
                given = tuple(self.packed_filters(t, transposed) if n.startswith("weight") else t for n, t in named)
            values = constants(self.family, name, x, weight, self.middle, block) | more
            warps: dict[str, Any] = {"num_warps": block.warps, "registers": block.registers}
            launch(kernel, grid, *given, scratch, batch, *numbers, **warps, **values)

        if block is not None:
            start(block)
            return
        key = (name, tuple(x.shape), tuple(weight.shape[1:]), x.dtype, offset, segments)
        choose_block(key, self.family.blocks(name, x, weight, offset), batch * segments, x.device, start)


def samples(input: Tensor, first: Affine | None) -> Tensor:
    """The input of a span as ``Family`` takes it: x, or a state with the batch first."""
    return input if first is not None else input[0].movedim(-1, 0)


def span(family: Family, input: Tensor, params: ChainParams, settings: ChainSettings, reader: str = "") -> Span:
    """Of a call."""
    weight, bias = params.hidden
    middle = weight.shape[1] - settings.outputs - 1 if settings.offset else -1
    hidden = weight.contiguous(), bias.contiguous()
    return Span(family, samples(input, params.first), hidden, middle, settings.start % RENORMALISE_PERIOD, reader)


def words(state: Tensor | layered.HiLo) -> tuple[Tensor, Tensor, Tensor]:
    """(base, hi, lo) of a state, a gradient or a tangent; three times lo in plain form."""
    if isinstance(state, Tensor):
        state = state.contiguous()
        return state[0], state[len(state) // 2], state[-1]
    if state.base is None:
        return state.lo, state.lo, state.lo
    return state.base, state.hi, state.lo


def initial_words(
    family: Family,
    input: Tensor,
    first: Affine | None,
    tangents: tuple[Tensor | None, ...],
    scale: float,
    offset: bool,
    outputs: int,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """``words`` of a span's first state and of its tangent; arguments as ``layered.initial_tangent`` has them."""
    if first is None:  # as they came in, without a copy
        return words(input), words(torch.zeros_like(input) if tangents[0] is None else tangents[0])
    state, tangent = layered.initial_tangent(family.layer, input, first, tangents, scale, offset, outputs)
    return words(state), words(tangent)


def forward(family: Family, *args: Any) -> tuple[Tensor, Tensor]:
    """(output, saved) of a span, see ``narrowdeep.ops.chain``."""
    input, params, settings, segment = ForwardArgs.of(args)
    (scale, offset, outputs, _), (first, hidden, last) = settings, params
    if not family.supported("forward", samples(input, first), hidden.weight):
        return layered.forward(family.layer, *args)
    these = span(family, input, params, settings, "forward")
    layers = these.layers
    if first is None:
        base, hi, lo = words(input)
    else:
        x = input.movedim(0, -1)
        base, hi, lo = words(layered.first_state(family.layer, x, *first, outputs, scale, offset))
    # A kernel saves the states at both ends, too: one more row is cheaper than a question in every layer.
    saved = empty(lo, *saved_shape(layers, tuple(lo.shape), offset, segment))
    final = empty(lo, these.words, *lo.shape)
    if not triton_shooting.forward(these, (base, hi, lo), saved, final, segment, scale):
        tensors = (base, hi, lo, *these.weights("forward"), saved if segment else final, final)
        numbers = (layers, segment if segment > 1 else layers, these.phase)
        these.run(chain_forward, "forward", tensors, numbers, SAVE=min(segment, 2))
    saved = saved[int(first is None and segment > 0) : saved.shape[0] - (segment == 1 and last is None)]
    if last is None:
        return final, saved
    state = layered.HiLo(base if offset else None, final[-1], these.middle, final[1] if offset else None)
    h = state.full(out=torch.empty_like(lo))
    return layered.last_output(family.layer, state, h, *last), saved


@dataclass
class Descent:
    """The backward of a span, a group of layers at a time from the top; ``gradient`` is G of the first state at last.

    Arguments as in ``narrowdeep.ops.chain``, ``segment`` at least 1.
    """

    family: Family
    input: Tensor
    params: ChainParams
    saved: Tensor
    settings: ChainSettings
    segment: int
    step: int
    """Layers a group, a multiple of ``segment``."""
    r: Tensor | None = None
    h_last: Tensor | None = None
    gradient: Tensor | None = None
    """(3, n, *positions, B), in plain form (1, n, *positions, B)."""

    def span(self) -> tuple[Span, tuple[Tensor, Tensor, Tensor], int]:
        """(what every kernel needs; base, first row and saved states as ``chain_recompute`` takes them; ``given``)."""
        scale, offset, outputs, _ = self.settings
        these = span(self.family, self.input, self.params, self.settings, "backward")
        saved, given = self.saved.contiguous(), int(self.params.first is None)
        if given:
            state = self.input.contiguous()
            return these, (state[0], state[-2:] if offset else state, saved), given
        x, width = self.input.movedim(0, -1), self.params.hidden.weight.shape[1]
        base = layered.base_of(x, width, outputs, scale) if offset else saved
        return these, (base, saved, saved), given

    def above(self, grad: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """G of the last state, whose value is h, as it comes to the kernels; keeps what a last layer will need."""
        if self.params.last is None:
            return words(grad)
        self.h_last = h.clone()  # the rest of its group goes
        self.r, top = layered.last_gradient(self.family.layer, grad, h, self.params.last.weight, self.settings.offset)
        return words(top)

    def first_states(self, states: tuple[Tensor, Tensor, Tensor], count: int) -> Tensor:
        """States 0 .. count where every state was saved but the one that came in."""
        base, row, saved = states
        state = ((base + row[0]) + row[1])[None] if self.settings.offset else row
        return torch.cat((state, saved[:count, 0]))

    def groups(self, grad: Tensor, keep_g: bool) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        """(first, last, h, g): states first .. last-1 and G of first+1 .. last (if ``keep_g``), (layers, n, ...).

        Before the first one, ``r`` and ``h_last`` are what ``layered.last_gradients`` takes, if there is a last layer.
        """
        segment, end = self.segment, self.params.last
        these, states, given = self.span()
        saved, layers = states[-1], these.layers
        shape = saved.shape[2:]
        for first in range((layers - 1) // self.step * self.step, -1, -self.step):
            last = min(first + self.step, layers)
            count = last - first
            if segment > 1:
                h = empty(saved, count + (last == layers), *shape)
                tensors: tuple[Tensor, ...] = (*states, *these.weights("recompute"), h)
                numbers: tuple[int, ...] = (layers, segment, these.phase, first // segment, given)
                these.run(chain_recompute, "recompute", tensors, numbers, segments=triton.cdiv(count, segment))
            elif given and first == 0:  # the state that came in was not saved again
                h = self.first_states(states, count if end is not None and last == layers else count - 1)
            else:
                h = saved[first - given :, 0]
            masked = int(last < layers or end is None)
            before = (
                words(self.gradient) if self.gradient is not None else self.above(grad, h[0 if end is None else count])
            )
            g = empty(saved, count, *shape) if keep_g else h
            self.gradient = triton_shooting.backward(these, before, h, g, (first, last), masked, keep_g)
            if self.gradient is None:
                self.gradient = empty(saved, these.words, *shape)
                tensors = (*before, these.weights("backward")[0], h, self.gradient, g)
                these.run(chain_backward, "backward", tensors, (layers, these.phase, first, last, masked), STORE=keep_g)
            yield first, last, h[:count], g
            del h, g  # before those of the next group are made
            tensors = ()

    def full(self) -> Tensor:
        """G of the first state as one value."""
        assert self.gradient is not None
        g = self.gradient
        return (g[0] + g[1]) + g[2] if self.settings.offset else g[0]


def layers_a_group(state: Tensor, segment: int, device: torch.device) -> int:
    """Layers whose states and gradients fit ``scratch_bytes``, a multiple of ``segment``; ``state`` is one of them."""
    bytes_a_layer = (1 if segment == 1 else 2) * state.numel() * state.element_size()
    return min(MOST_SEGMENTS, max(1, scratch_bytes(device) // (bytes_a_layer * segment))) * segment


def jvp(family: Family, *args: Any) -> Tensor:
    """The tangent of a span's output."""
    input, params, tangents, settings = JvpArgs.of(args)
    (scale, offset, outputs, _), (first, hidden, last) = settings, params
    if not family.supported("jvp", samples(input, first), hidden.weight):
        return layered.jvp(family.layer, *args)
    these = span(family, input, params, settings)
    state, tangent = initial_words(family, input, first, tangents.first, scale, offset, outputs)
    h = empty(state[2], *state[2].shape)
    final = empty(h, these.words, *h.shape)
    hidden_t, has = these.tangents(tangents)
    tensors = (*state, *tangent, *these.hidden, *hidden_t, h, final)
    these.run(chain_jvp, "jvp", tensors, (these.layers, these.phase), **has)
    if last is None:
        return final
    after = layered.HiLo(tangent[0] if offset else None, final[-1], these.middle, final[1] if offset else None)
    full = after.full(out=torch.empty_like(h))
    return layered.last_tangent(family.layer, after, full, h, last.weight, tangents.last)
