"""The MLP chain in plain torch: the definition of truth for every other version of these ops.

One legend of symbols, shared with ``csrc/`` and the Triton kernels (``docs/theory.md`` derives them):

====================  ====================================================================================
``L``, ``n``, ``B``   affine layers, hidden width, batch size
``base``              fixed part of a hidden state: ``[scale relu(x); 0; scale 1]`` in offset form, 0 in plain form
``moved``             what has been moved out of ``a`` so far, every ``MOVE_PERIOD`` layers, by an exact two-sum
``a``                 the rest, so that the hidden state is ``h = (base + moved) + a``
``keep``              diagonal of the identity part E of a hidden weight: ``[1..1, 0, 1..1]``, or 0 in plain form
``R, moved, g``       the same three parts of the gradient with respect to a pre-activation, ``G = (R + moved) + g``
====================  ====================================================================================

Hidden states are numbered 1 .. L-1 (state ``t`` is the output of the ReLU after affine layer ``t``); hidden layer
``j`` (0-based, of L-2) takes state ``j+1`` to state ``j+2``. Where parts are moved depends on ``t`` alone, so a result
never depends on the checkpoint segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

MOVE_PERIOD = 32
"""Layers between two exact moves of ``a`` into ``moved`` (THEORY section 5: 2.6e-8 at L = 10000; more often gains nothing)."""


def saved_shape(depth: int, width: int, batch: int, offset: bool, segment: int) -> tuple[int, ...]:
    """Shape of what ``mlp_forward`` saves for ``mlp_backward``.

    ``segment`` 0: nothing, ``(0, 1, n, B)``. 1: every hidden state h, ``(L-1, 1, n, B)``. k >= 2: states 1, 1+k, ...
    as ``(moved, a)`` in offset form, h in plain form, ``(ceil((L-2)/k) or 1, 2 or 1, n, B)``.
    """
    if segment == 0:
        return (0, 1, width, batch)
    if segment == 1:
        return (depth - 1, 1, width, batch)
    return (max(1, -(-(depth - 2) // segment)), 2 if offset else 1, width, batch)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Knuth's exact sum: ``s = fl(a + b)`` and ``e`` with ``s + e == a + b`` exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def _move(base: Tensor, moved: Tensor, a: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Move ``a`` into ``moved`` where ``keep``; a unit that stands at exactly 0 stays there."""
    total, rest = two_sum(moved, a)
    dead = (base + moved) + a == 0
    total = torch.where(dead, -base, total)
    rest = torch.where(dead, torch.zeros_like(rest), rest)
    return torch.where(keep, total, moved), torch.where(keep, rest, a)


def _identity(x: Tensor, width: int, out_features: int, scale: float, offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(base, carry, keep)``: base (n, B), the part ``E_1 x + base_bias - base`` of the first layer, keep (n, 1)."""
    batch, in_features = x.shape
    base, carry = x.new_zeros(width, batch), x.new_zeros(width, batch)
    keep = torch.zeros(width, 1, dtype=torch.bool, device=x.device)
    if offset:
        left = scale * x.t()
        base[:in_features] = torch.where(left < 0, torch.zeros_like(left), left)
        carry[:in_features] = torch.where(left < 0, left, torch.zeros_like(left))
        base[width - out_features :] = scale
        keep[:in_features] = True
        keep[width - out_features :] = True
    return base, carry, keep


def _clip(z: Tensor, floor: Tensor) -> Tensor:
    """max(z, floor) that keeps a NaN in z (as ``torch.relu`` does)."""
    return torch.where(floor > z, floor, z)


def _states(x, params, scale, offset):
    """Yield ``(t, base, moved, a)`` for every hidden state t = 1 .. L-1."""
    first_weight, first_bias, hidden_weight, hidden_bias, last_weight, _ = params
    width, depth = first_weight.shape[0], hidden_weight.shape[0] + 2
    base, carry, keep = _identity(x, width, last_weight.shape[0], scale, offset)
    moved = torch.zeros_like(base)
    a = _clip(carry + (first_weight @ x.t() + first_bias[:, None]), -base)
    yield 1, base, moved, a
    for t in range(2, depth):
        h = (base + moved) + a
        z = torch.where(keep, a, torch.zeros_like(a)) + (hidden_weight[t - 2] @ h + hidden_bias[t - 2][:, None])
        a = _clip(z, -(base + moved))
        if offset and (t - 1) % MOVE_PERIOD == 0:
            moved, a = _move(base, moved, a, keep)
        yield t, base, moved, a


def mlp_forward(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    scale: float,
    offset: bool,
    segment: int,
) -> tuple[Tensor, Tensor]:
    """``f(x)``, shape (B, out), and what the backward needs (see ``saved_shape``)."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    out_features, width = last_weight.shape
    depth = hidden_weight.shape[0] + 2
    saved = x.new_empty(saved_shape(depth, width, x.shape[0], offset, segment))
    for t, base, moved, a in _states(x, params, scale, offset):  # noqa: B007 (the last state is used below)
        h = (base + moved) + a
        if segment == 1:
            saved[t - 1, 0] = h
        elif segment > 1 and (t - 1) % segment == 0 and (t - 1) // segment < saved.shape[0]:
            saved[(t - 1) // segment] = torch.stack((moved, a)) if offset else h
    out = last_weight @ h + last_bias[:, None]
    if offset:
        out = (moved + a)[width - out_features :] + out
    return out.t().contiguous(), saved


def mlp_backward(
    grad_out: Tensor,
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    saved: Tensor,
    scale: float,
    offset: bool,
    segment: int,
    need_input: bool,
    need_params: bool,
) -> tuple[Tensor, ...]:
    """Gradients of x, first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias.

    ``saved`` is not read: the states are computed again from x. What is not needed comes back empty, shape (0,).
    """
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    width, out_features, in_features = first_weight.shape[0], last_weight.shape[0], x.shape[1]
    grads = [torch.empty_like(p) for p in params]
    states = [(base + moved) + a for _, base, moved, a in _states(x, params, scale, offset)]
    _, _, keep = _identity(x, width, out_features, scale, offset)
    r = grad_out.t()
    big_r = torch.zeros_like(states[0])
    if offset:
        big_r[width - out_features :] = r
    moved, h = torch.zeros_like(big_r), states[-1]
    grads[4], grads[5] = r @ h.t(), r.sum(1)
    grad_h = last_weight.t() @ r
    g = torch.where(h <= 0, -big_r, grad_h)
    for t in range(len(states), 1, -1):  # here G = (big_r + moved) + g is the gradient with respect to z_t
        full, h = (big_r + moved) + g, states[t - 2]
        grads[2][t - 2], grads[3][t - 2] = full @ h.t(), full.sum(1)
        grad_h = torch.where(keep, g, torch.zeros_like(g)) + hidden_weight[t - 2].t() @ full
        g = torch.where(h <= 0, -(big_r + moved), grad_h)
        if offset and (t - 1) % MOVE_PERIOD == 0:
            moved, g = _move(big_r, moved, g, keep)
    full = (big_r + moved) + g
    grads[0], grads[1] = full @ x, full.sum(1)
    grad_x = first_weight.t() @ full
    if offset:
        grad_x = grad_x + scale * full[:in_features]
    empty = x.new_empty(0)
    return (grad_x.t().contiguous() if need_input else empty, *(grads if need_params else [empty.clone() for _ in grads]))


def mlp_jvp(
    x: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    x_t: Tensor | None,
    first_weight_t: Tensor | None,
    first_bias_t: Tensor | None,
    hidden_weight_t: Tensor | None,
    hidden_bias_t: Tensor | None,
    last_weight_t: Tensor | None,
    last_bias_t: Tensor | None,
    scale: float,
    offset: bool,
) -> Tensor:
    """Directional derivative of ``mlp_forward``'s output, shape (B, out); ``None`` stands for a zero tangent.

    The tangent is carried in three parts as well, ``T = (D + moved) + tau`` with D = ``[scale relu'(x) x_t; 0; 0]``.
    """
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    width, out_features, in_features = first_weight.shape[0], last_weight.shape[0], x.shape[1]
    _, _, keep = _identity(x, width, out_features, scale, offset)
    d = x.new_zeros(width, x.shape[0])
    moved, tau = torch.zeros_like(d), torch.zeros_like(d)
    h_before = x.t()
    if x_t is not None:
        tau = first_weight @ x_t.t()
        if offset:
            left = scale * x_t.t()
            d[:in_features] = torch.where(x.t() <= 0, torch.zeros_like(left), left)
            tau[:in_features] += torch.where(x.t() <= 0, left, torch.zeros_like(left))
    if first_weight_t is not None:
        tau = tau + first_weight_t @ h_before
    if first_bias_t is not None:
        tau = tau + first_bias_t[:, None]
    for t, base, h_moved, a in _states(x, params, scale, offset):
        h = (base + h_moved) + a
        if t > 1:
            full = (d + moved) + tau
            tau = torch.where(keep, tau, torch.zeros_like(tau)) + hidden_weight[t - 2] @ full
            if hidden_weight_t is not None:
                tau = tau + hidden_weight_t[t - 2] @ h_before
            if hidden_bias_t is not None:
                tau = tau + hidden_bias_t[t - 2][:, None]
        tau = torch.where(h <= 0, -(d + moved), tau)
        if offset and t > 1 and (t - 1) % MOVE_PERIOD == 0:
            moved, tau = _move(d, moved, tau, keep)
        h_before = h
    out = last_weight @ ((d + moved) + tau)
    if offset:
        out = (moved + tau)[width - out_features :] + out
    if last_weight_t is not None:
        out = out + last_weight_t @ h_before
    if last_bias_t is not None:
        out = out + last_bias_t[:, None]
    return out.t().contiguous()
