"""A chain as several graph nodes: its first layer, chunks of its hidden layers, its last layer.

The gradient of a chunk's parameters is then complete, used by a hook and freed before the next chunk's is begun: the
gradients of all layers never exist at once. Values are those of the chain in one op up to rounding. What goes from node
to node is a state as the forward saves it (``narrowdeep.ops.reference.advance``), whose gradient is ``(moved, g)``, and

    skip    zeros (B, out) that take no memory, and whose gradient is that of the output

from which every node makes R again: added to g, it would lose what carrying it apart is for. The base depends on x, and
R carries that past every chunk, so x gets its gradient in the first layer alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from narrowdeep.ops import layered
from narrowdeep.ops.chain import ChainOps
from narrowdeep.ops.conv.layered import CONVOLUTION
from narrowdeep.ops.conv.op import ops as conv_ops
from narrowdeep.ops.mlp.layered import LINEAR
from narrowdeep.ops.mlp.op import ops as mlp_ops

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
    @once_differentiable
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
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        need_params = any(ctx.needs_input_grad[4:6])
        retreat = _FAMILIES[ctx.family][0].retreat
        grad_state, *grads = retreat(grad_state, grad_out, *ctx.saved_tensors, *ctx.settings, need_params)
        return (None, None, grad_out, grad_state, *(grads if need_params else (None, None)), None, None, None, None)


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
    @once_differentiable
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
) -> Tensor:
    """f(x), (B, out), of a chain whose hidden weights and biases come in chunks; differentiable once, by backward.

    ``x`` is (B, in, *positions); everything else as the raw ops take it. ``segment`` counts from the first layer of a
    chunk, whose state is kept in any case.
    """
    skip, state = _First.apply(family, x, *first, last[0].shape[0], scale, offset)
    number = 1
    for weight, bias in hidden:
        skip, state = _Hidden.apply(family, x, skip, state, weight, bias, scale, offset, number, segment)
        number += weight.shape[0]
    return _Last.apply(family, x, skip, state, *last, scale, offset)
