"""A chain as several graph nodes: its first layer, chunks of its hidden layers, its last layer.

The gradient of a chunk's parameters is then complete, used by a hook and freed before the next chunk's is begun: the
gradients of all layers never exist at once. Values are those of the chain in one op up to rounding. What goes from node
to node is a state as the forward saves it (``narrowdeep.ops.reference.advance``), whose gradient is ``(moved, g)``, and

    skip    zeros (B, out) that take no memory, and whose gradient is that of the output

from which every node makes R again: added to g, it would lose what carrying it apart is for. The base depends on x, and
R carries that past every chunk, so x gets its gradient in the first layer alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from narrowdeep.memory.schedule import Op, binomial, encode, resumed
from narrowdeep.ops import layered
from narrowdeep.ops.autograd import differentiated_once
from narrowdeep.ops.chain import ChainOps
from narrowdeep.ops.conv.layered import CONVOLUTION
from narrowdeep.ops.conv.op import ops as conv_ops
from narrowdeep.ops.mlp.layered import LINEAR
from narrowdeep.ops.mlp.op import ops as mlp_ops
from narrowdeep.ops.reference import advance_saved_shape

_FAMILIES: dict[str, tuple[ChainOps, layered.Layer]] = {"mlp": (mlp_ops, LINEAR), "conv": (conv_ops, CONVOLUTION)}


def _skip(x: Tensor, outputs: int) -> Tensor:
    return x.new_zeros(()).expand(x.shape[0], outputs)


class _First(torch.autograd.Function):
    """forward(family, x, first_weight, first_bias, outputs, scale, offset) -> (skip, state 1)."""

    @staticmethod
    def forward(
        ctx: Any, family: str, x: Tensor, weight: Tensor, bias: Tensor, outputs: int, scale: float, offset: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias)
        ctx.settings = (family, scale, offset)
        layer = _FAMILIES[family][1]
        params = (weight, bias, weight, bias, weight.new_empty(outputs, 0), bias)  # only outputs is read of the rest
        state = layered.first_state(layer, x.movedim(0, -1), params, scale, offset)
        return _skip(x, outputs), layered.left(state)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, bias), (family, scale, offset) = ctx.saved_tensors, ctx.settings
        layer = _FAMILIES[family][1]
        gradient = layered.entered_gradient(grad_state, grad_out, x.shape[1], offset)
        full = gradient.full(out=torch.empty_like(gradient.a))
        need_params = any(ctx.needs_input_grad[2:4])
        grads = [torch.empty_like(weight), torch.empty_like(bias)] if need_params else []
        params = (weight, bias, weight, bias, weight, bias)  # only the first two are read
        need_input = ctx.needs_input_grad[1]
        grad_x = layered.first_gradients(layer, full, x.movedim(0, -1), params, grads, scale, offset, need_input)
        return (None, grad_x if need_input else None, *(grads or (None, None)), None, None, None)


class _Hidden(torch.autograd.Function):
    """forward(family, x, skip, state, hidden_weight, hidden_bias, scale, offset, first, segment) -> (skip, state)."""

    @staticmethod
    def forward(
        ctx: Any,
        family: str,
        x: Tensor,
        skip: Tensor,
        state: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: float,
        offset: bool,
        first: int,
        segment: int,
    ) -> tuple[Tensor, Tensor]:
        settings = (skip.shape[1], scale, offset, first, segment)
        after, saved = _FAMILIES[family][0].advance(state, x, weight, bias, *settings)
        ctx.save_for_backward(state, x, weight, bias, saved)
        ctx.family, ctx.settings = family, settings
        return _skip(x, skip.shape[1]), after

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        need_params = any(ctx.needs_input_grad[4:6])
        retreat = _FAMILIES[ctx.family][0].retreat
        grad_state, *grads = retreat(grad_state, grad_out, *ctx.saved_tensors, *ctx.settings, need_params)
        return (None, None, grad_out, grad_state, *(grads if need_params else (None, None)), None, None, None, None)


@lru_cache(maxsize=8)
def _encoded(length: int, snapshots: int) -> array[int]:
    return encode(resumed(binomial(length, snapshots)), length, snapshots)


class _Walk:
    """Goes from state to state as a schedule says. ``slots`` keeps states; one that is freed is dropped at once."""

    def __init__(self, family: str, tensors: tuple[Tensor, ...], settings: tuple[Any, ...]) -> None:
        self.state, self.x, self.weight, self.bias = tensors
        self.outputs, self.scale, self.offset, self.first, self.segment, self.snapshots = settings
        self.ops = _FAMILIES[family][0]
        self.slots: dict[int, Tensor] = {}
        self.current, self.layer = self.state, 0

    def actions(self) -> Iterator[tuple[Op, int, int]]:
        length = -(-self.weight.shape[0] // self.segment)
        values = _encoded(length, self.snapshots)
        for i in range(2, len(values), 3):
            yield Op(values[i]), values[i + 1], values[i + 2]

    def advance(self, layer: int) -> None:
        if layer > self.layer:
            part = slice(self.layer, layer)
            settings = (self.outputs, self.scale, self.offset, self.first + self.layer, 0)
            self.current, _ = self.ops.advance(self.current, self.x, self.weight[part], self.bias[part], *settings)
            self.layer = layer

    def keep_or_go(self, op: Op, segment: int, slot: int) -> None:
        """Every action but REVERSE."""
        if op == Op.ADVANCE:
            self.advance(segment * self.segment)
        elif op == Op.STORE:
            self.slots[slot] = self.current
        elif op == Op.LOAD:
            self.current, self.layer = self.slots[slot], segment * self.segment
        else:
            del self.slots[slot]

    def to_output(self) -> None:
        """The first sweep: the states that the backward starts from are kept, the last one is current."""
        for action in self.actions():
            if action[0] == Op.LOAD:
                break
            self.keep_or_go(*action)

    def back(
        self, grad_state: Tensor, grad_out: Tensor, need_params: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The backward, from what ``to_output`` has kept: the gradients of the first state, of weight and bias."""
        grads = [torch.empty_like(p) for p in (self.weight, self.bias)] if need_params else [None, None]
        reversing = False
        for op, segment, slot in self.actions():
            reversing = reversing or op == Op.LOAD
            if not reversing:  # done by to_output
                continue
            if op != Op.REVERSE:
                self.keep_or_go(op, segment, slot)
                continue
            part = slice(segment * self.segment, min((segment + 1) * self.segment, self.weight.shape[0]))
            layers = max(2, part.stop - part.start)  # as a segment: the part's own states are not saved
            saved = self.x.new_empty(
                advance_saved_shape(part.stop - part.start, self.state.shape[1:], self.offset, layers)
            )
            settings = (self.outputs, self.scale, self.offset, self.first + part.start, layers, need_params)
            tensors = (self.current, self.x, self.weight[part], self.bias[part], saved)
            self.current = self.state  # nothing else holds a state that is reversed
            grad_state, *found = self.ops.retreat(grad_state, grad_out, *tensors, *settings)
            del tensors
            for grad, value in zip(grads, found, strict=True):
                if grad is not None:
                    grad[part] = value
        return grad_state, grads[0], grads[1]


class _Scheduled(torch.autograd.Function):
    """As ``_Hidden``, with at most ``snapshots`` states kept: a binomial schedule over segments of ``segment`` layers.

    forward(family, x, skip, state, hidden_weight, hidden_bias, scale, offset, first, segment, snapshots)
    -> (skip, state).
    """

    @staticmethod
    def forward(
        ctx: Any,
        family: str,
        x: Tensor,
        skip: Tensor,
        state: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: float,
        offset: bool,
        first: int,
        segment: int,
        snapshots: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(state, x, weight, bias)
        ctx.family, ctx.settings = family, (skip.shape[1], scale, offset, first, segment, snapshots)
        walk = _Walk(family, (state, x, weight, bias), ctx.settings)
        if any(ctx.needs_input_grad):
            walk.to_output()
            del walk.slots[0]  # save_for_backward keeps it
        ctx.slots = walk.slots
        walk.advance(weight.shape[0])
        return _skip(x, skip.shape[1]), walk.current

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        walk = _Walk(ctx.family, tensors, ctx.settings)
        if ctx.slots is None:  # a second time (retain_graph=True): the first has dropped them
            walk.to_output()
        else:
            walk.slots, ctx.slots = {0: tensors[0], **ctx.slots}, None
        need_params = any(ctx.needs_input_grad[4:6])
        grad_state, *grads = walk.back(grad_state, grad_out, need_params)
        return (None, None, grad_out, grad_state, *grads, None, None, None, None, None)


class _Last(torch.autograd.Function):
    """forward(family, x, skip, state, last_weight, last_bias, scale, offset) -> out."""

    @staticmethod
    def forward(
        ctx: Any,
        family: str,
        x: Tensor,
        skip: Tensor,
        state: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: float,
        offset: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, state, weight, bias)
        ctx.settings = (family, scale, offset)
        parts = layered.entered(state, x.movedim(0, -1), weight.shape[0], scale, offset)
        h = parts.full(out=torch.empty_like(parts.a))
        return layered.last_output(_FAMILIES[family][1], parts, h, weight, bias)

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        (x, state, weight, bias), (family, scale, offset) = ctx.saved_tensors, ctx.settings
        layer = _FAMILIES[family][1]
        parts = layered.entered(state, x.movedim(0, -1), weight.shape[0], scale, offset)
        h = parts.full(out=torch.empty_like(parts.a))
        r, gradient = layered.last_gradient(layer, grad_out, h, weight, offset)
        grads = [torch.empty_like(p) for p in (weight, bias)]
        if any(ctx.needs_input_grad[4:6]):
            layered.last_gradients(layer, r, h, [*grads, *grads, *grads])  # it fills the last two
        gradient.mask(h <= 0, gradient.a.clone())
        return (None, None, grad_out, layered.left(gradient), *grads, None, None)


def chain(
    family: str,
    x: Tensor,
    first: tuple[Tensor, Tensor],
    hidden: Sequence[tuple[Tensor, Tensor]],
    last: tuple[Tensor, Tensor],
    scale: float,
    offset: bool,
    segment: int,
    snapshots: int | None = None,
) -> Tensor:
    """f(x), (B, out), of a chain whose hidden weights and biases come in chunks; differentiable once, by backward.

    ``x`` is (B, in, *positions); everything else as the raw ops take it. ``segment`` counts from the first layer of a
    chunk, whose state is kept in any case; with ``snapshots`` no more states than that are kept in a chunk.
    """
    skip, state = _First.apply(family, x, *first, last[0].shape[0], scale, offset)
    number = 1
    for weight, bias in hidden:
        settings = (scale, offset, number, segment)
        if snapshots is not None and snapshots * segment < weight.shape[0]:
            skip, state = _Scheduled.apply(family, x, skip, state, weight, bias, *settings, snapshots)
        else:
            skip, state = _Hidden.apply(family, x, skip, state, weight, bias, *settings)
        number += weight.shape[0]
    return _Last.apply(family, x, skip, state, *last, scale, offset)
