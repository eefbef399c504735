"""The tangent of a span's backward, one layer at a time in torch's own operators (see ``narrowdeep.ops.layered``)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from narrowdeep.ops.layered import (
    HiLo,
    Layer,
    entered,
    first_gradients,
    initial_tangent,
    last_gradient,
    last_gradients,
    step_tangent,
)
from narrowdeep.ops.params import BackwardJvpArgs, ChainTangents
from narrowdeep.ops.precision import at_full_precision
from narrowdeep.ops.reference import RENORMALISE_PERIOD


def _product_rule(layer: Layer, g: Tensor, g_t: Tensor, h: Tensor, h_t: Tensor, grads: list[Tensor]) -> None:
    """Tangents of the gradients of a weight and its bias: ``G' h^T + G T^T`` and G'."""
    last_gradients(layer, g_t, h, grads)
    grads[0].add_(layer.weight_grad(g, h_t, torch.empty_like(grads[0])))


def last_gradient_tangents(
    layer: Layer,
    grad: Tensor,
    grad_t: Tensor,
    h: Tensor,
    h_t: Tensor,
    last_weight: Tensor,
    tangents: ChainTangents,
    offset: bool,
    grads: list[Tensor],
) -> tuple[HiLo, HiLo]:
    """G and G' of the last state, ``h`` with the tangent ``h_t``; they have still to pass its ReLU.

    Tangents of the gradients of last_weight and last_bias go into ``grads``, if any.
    """
    r, g = last_gradient(layer, grad, h, last_weight, offset)
    r_t, g_t = last_gradient(layer, grad_t, h, last_weight, offset)
    if tangents.last_weight is not None:
        g_t.lo.add_(layer.transpose(tangents.last_weight, r, torch.empty_like(h)))
    if grads:
        _product_rule(layer, r, r_t, h, h_t, grads)
    return g, g_t


def first_gradient_tangents(
    layer: Layer,
    g: Tensor,
    g_t: Tensor,
    input: Tensor,
    first_weight: Tensor,
    tangents: ChainTangents,
    grads: list[Tensor],
    scale: float,
    offset: bool,
    need_input: bool,
) -> Tensor:
    """The tangent of the gradient of x from G and G' of state 0; those of first_weight and first_bias into ``grads``,
    if any."""
    x = input.movedim(0, -1)
    found = first_gradients(layer, g_t, x, first_weight, grads, scale, offset, need_input)
    if grads and tangents.input is not None:
        grads[0].add_(layer.weight_grad(g, tangents.input.movedim(0, -1), torch.empty_like(grads[0])))
    if need_input and tangents.first_weight is not None:
        found.add_(layer.transpose(tangents.first_weight, g, torch.empty_like(x)).movedim(-1, 0))
    return found


@at_full_precision
def backward_jvp(layer: Layer, *args: Any) -> tuple[Tensor, ...]:
    """Tangents of a span's gradients; arguments as ``narrowdeep.ops.chain`` has them. Keeps sqrt(layers) states."""
    grad, grad_t, input, params, tangents, settings, need_input, need_params = BackwardJvpArgs.of(args)
    (scale, offset, outputs, start), (first, hidden, last) = settings, params
    weight_t, layers = tangents.hidden_weight, params.layers
    step = max(1, math.isqrt(layers))
    grads = [input.new_empty(0 if p is None or not need_params else p.shape) for p in params.flat()]
    if grad_t is None:
        grad_t = torch.zeros_like(grad)

    state, tangent = initial_tangent(layer, input, first, tangents.first, scale, offset, outputs)
    h, room = state.full(out=torch.empty_like(state.lo)), torch.empty_like(state.lo)
    kept: list[tuple[HiLo, HiLo]] = []
    for j in range(layers):
        if j % step == 0:
            kept.append((state.clone(), tangent.clone()))
        step_tangent(layer, state, tangent, hidden, tangents.hidden, j, h, room, start + j + 1)

    if last is None:
        g, g_t = entered(grad, outputs), entered(grad_t, outputs)
    else:
        h_t, ends = tangent.full(out=room), grads[4:] if need_params else []
        g, g_t = last_gradient_tangents(layer, grad, grad_t, h, h_t, last.weight, tangents, offset, ends)
        for gradient in (g, g_t):
            gradient.mask(h <= 0, gradient.lo.clone())
    full, full_t = torch.empty_like(h), torch.empty_like(h)
    z, z_t = torch.empty_like(h), torch.empty_like(h)
    for begin in reversed(range(0, layers, step)):
        end = min(begin + step, layers)
        state, tangent = kept.pop()
        values = [(state.full(out=torch.empty_like(h)), tangent.full(out=torch.empty_like(h)))]
        h.copy_(values[0][0])
        for j in range(begin, end - 1):
            step_tangent(layer, state, tangent, hidden, tangents.hidden, j, h, room, start + j + 1)
            values.append((h.clone(), tangent.full(out=torch.empty_like(h))))
        for j in reversed(range(begin, end)):
            g.full(out=full)
            g_t.full(out=full_t)
            value, value_t = values.pop()
            if need_params:
                _product_rule(layer, full, full_t, value, value_t, [grads[2][j], grads[3][j]])
            layer.transpose(hidden.weight[j], full, z)
            layer.transpose(hidden.weight[j], full_t, z_t)
            if weight_t is not None:
                z_t.add_(layer.transpose(weight_t[j], full, room))
            for gradient, product in ((g, z), (g_t, z_t)):
                gradient.mask(value <= 0, gradient.add_skip(product))
                if (start + j + 1) % RENORMALISE_PERIOD == 0:
                    gradient.renormalise()
    if first is None:
        return g_t.state() if need_input else input.new_empty(0), *grads
    g.full(out=full)
    g_t.full(out=full_t)
    ends = grads[:2] if need_params else []
    found = first_gradient_tangents(layer, full, full_t, input, first.weight, tangents, ends, scale, offset, need_input)
    return found, *grads
