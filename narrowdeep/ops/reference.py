"""A deep narrow chain in plain torch: the definition of truth for every other version of the chain ops.

One legend of symbols, shared with ``csrc/`` and the Triton kernels (``docs/theory.md`` derives them):

====================  ====================================================================================
``L``, ``n``, ``B``   affine layers, hidden width (channels), batch size
``base``              fixed part of a hidden state: ``[scale relu(x); 0; scale 1]`` in offset form, 0 in plain form
``moved``             what has been moved out of ``a`` so far, every ``MOVE_PERIOD`` layers, by an exact two-sum
``a``                 the rest, so that the hidden state is ``h = (base + moved) + a``
``keep``              diagonal of the identity part E of a hidden weight: ``[1..1, 0, 1..1]``, or 0 in plain form
``R, moved, g``       the same three parts of the gradient with respect to a pre-activation, ``G = (R + moved) + g``
====================  ====================================================================================

A state is a tensor (n, *positions, B): no positions for the MLP, (H, W) for the convolution chain, whose output is the
mean over positions. Hidden states are numbered 1 .. L-1 (state ``t`` is the output of the ReLU after affine layer
``t``); hidden layer ``j`` (0-based, of L-2) takes state ``j+1`` to state ``j+2``. Where parts are moved depends on
``t`` alone, so a result never depends on the checkpoint segment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MOVE_PERIOD = 32
"""Layers between two exact moves of ``a`` into ``moved`` (2.6e-8 off at L = 10000; more often gains nothing)."""


@dataclass(frozen=True)
class Affine:
    """The linear map of one layer without its bias, and its two transposes. States have the batch last."""

    apply: Callable[[Tensor, Tensor], Tensor]
    """(weight, h) -> z"""
    transpose: Callable[[Tensor, Tensor], Tensor]
    """(weight, gradient of z) -> gradient of h"""
    weight_grad: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(weight, gradient of z, h) -> gradient of the weight, of which only the shape is read"""


def saved_shape(depth: int, state: tuple[int, ...], offset: bool, segment: int) -> tuple[int, ...]:
    """Shape of what the forward saves for the backward; ``state`` is (n, *positions, B).

    ``segment`` 0: nothing, ``(0, 1, *state)``. 1: every hidden state h, ``(L-1, 1, *state)``. k >= 2: states 1, 1+k,
    ... as ``(moved, a)`` in offset form, h in plain form, ``(ceil((L-2)/k) or 1, 2 or 1, *state)``.
    """
    if segment == 0:
        return (0, 1, *state)
    if segment == 1:
        return (depth - 1, 1, *state)
    return (max(1, -(-(depth - 2) // segment)), 2 if offset else 1, *state)


def advance_saved_shape(layers: int, state: tuple[int, ...], offset: bool, segment: int) -> tuple[int, ...]:
    """Shape of what ``advance`` over ``layers`` >= 1 hidden layers saves; ``state`` is (n, *positions, B).

    ``segment`` 0: nothing, ``(0, 1, *state)``. k >= 1: the states k, 2k, ... layers past the one it starts from and
    before the one it ends at, ``(ceil(layers/k) - 1, parts, *state)``; k = 1 as h, 1 part, k >= 2 as ``saved_shape``.
    """
    if segment == 0:
        return (0, 1, *state)
    return (max(1, -(-layers // segment)) - 1, 2 if offset and segment > 1 else 1, *state)


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


def _column(bias: Tensor, like: Tensor) -> Tensor:
    """A bias (n,) as (n, 1, ..., 1), to be added to states."""
    return bias.reshape(-1, *(1 for _ in like.shape[1:]))


def _sum(gradient: Tensor) -> Tensor:
    """Over positions and batch."""
    return gradient.flatten(1).sum(1)


def _identity(x: Tensor, width: int, outputs: int, scale: float, offset: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``(base, carry, keep)``: base, the part ``E_1 x + base_bias - base`` of the first layer, keep (n, 1, ..., 1).

    ``x`` is (in, *positions, B) here.
    """
    inputs = x.shape[0]
    base, carry = x.new_zeros(width, *x.shape[1:]), x.new_zeros(width, *x.shape[1:])
    keep = torch.zeros(width, *(1 for _ in x.shape[1:]), dtype=torch.bool, device=x.device)
    if offset:
        left = scale * x
        base[:inputs] = torch.where(left < 0, torch.zeros_like(left), left)
        carry[:inputs] = torch.where(left < 0, left, torch.zeros_like(left))
        base[width - outputs :] = scale
        keep[:inputs] = True
        keep[width - outputs :] = True
    return base, carry, keep


def _clip(z: Tensor, floor: Tensor) -> Tensor:
    """max(z, floor) that keeps a NaN in z (as ``torch.relu`` does)."""
    return torch.where(floor > z, floor, z)


def _kept(keep: Tensor, a: Tensor) -> Tensor:
    return torch.where(keep, a, torch.zeros_like(a))


def _states(
    affine: Affine, x: Tensor, params: tuple[Tensor, ...], scale: float, offset: bool
) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Yield ``(t, base, moved, a)`` for every hidden state t = 1 .. L-1; ``x`` has the batch last."""
    first_weight, first_bias, hidden_weight, hidden_bias, last_weight, _ = params
    base, carry, keep = _identity(x, first_weight.shape[0], last_weight.shape[0], scale, offset)
    moved = torch.zeros_like(base)
    a = _clip(carry + (affine.apply(first_weight, x) + _column(first_bias, x)), -base)
    for t, t_moved, t_a in _advanced(affine, base, moved, a, keep, hidden_weight, hidden_bias, 1, offset):
        yield t, base, t_moved, t_a


def _advanced(
    affine: Affine,
    base: Tensor,
    moved: Tensor,
    a: Tensor,
    keep: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    first: int,
    offset: bool,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield ``(t, moved, a)`` for state ``first``, which is given, and for those after each of the hidden layers."""
    yield first, moved, a
    for t, (weight, bias) in enumerate(zip(hidden_weight, hidden_bias, strict=True), first + 1):
        h = (base + moved) + a
        z = _kept(keep, a) + (affine.apply(weight, h) + _column(bias, h))
        a = _clip(z, -(base + moved))
        if offset and (t - 1) % MOVE_PERIOD == 0:
            moved, a = _move(base, moved, a, keep)
        yield t, moved, a


def _retreated(
    affine: Affine,
    big_r: Tensor,
    moved: Tensor,
    g: Tensor,
    keep: Tensor,
    states: list[Tensor],
    hidden_weight: Tensor,
    first: int,
    offset: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(moved, g)`` at state ``first`` from that after the last hidden layer, and the gradients of both parameters.

    ``states`` are the values h before each of the hidden layers. G is with respect to the pre-activation of its state.
    """
    grad_weight = torch.empty_like(hidden_weight)
    grad_bias = hidden_weight.new_empty(hidden_weight.shape[:2])
    for j in range(hidden_weight.shape[0] - 1, -1, -1):
        t, full, h = first + j, (big_r + moved) + g, states[j]
        grad_weight[j], grad_bias[j] = affine.weight_grad(hidden_weight[j], full, h), _sum(full)
        grad_h = _kept(keep, g) + affine.transpose(hidden_weight[j], full)
        g = torch.where(h <= 0, -(big_r + moved), grad_h)
        if offset and t > 1 and (t - 1) % MOVE_PERIOD == 0:  # the same layers as forward
            moved, g = _move(big_r, moved, g, keep)
    return moved, g, grad_weight, grad_bias


def _output_gradient(grad_out: Tensor, x: Tensor, width: int, offset: bool) -> tuple[Tensor, Tensor]:
    """``(r, R)``: the gradient of the last layer's pre-activation, and R, the part of it that goes straight back."""
    positions = x.shape[1:-1]
    # Every position has the same share in the mean, so R is constant over them.
    r = grad_out.t().reshape(grad_out.shape[1], *(1 for _ in positions), grad_out.shape[0])
    r = (r / math.prod(positions)).expand(grad_out.shape[1], *x.shape[1:])
    big_r = x.new_zeros(width, *x.shape[1:])
    if offset:
        big_r[width - grad_out.shape[1] :] = r
    return r, big_r


def _pool(z: Tensor) -> Tensor:
    """The mean over positions, (out, *positions, B) -> (B, out)."""
    positions = math.prod(z.shape[1:-1])
    return (z.reshape(z.shape[0], positions, z.shape[-1]).sum(1) / positions).t().contiguous()


def forward(
    affine: Affine,
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
    """``f(x)``, shape (B, out), and what the backward needs (see ``saved_shape``); ``x`` is (B, in, *positions)."""
    x = x.movedim(0, -1)
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    outputs, width = last_weight.shape[:2]
    saved = x.new_empty(saved_shape(hidden_weight.shape[0] + 2, (width, *x.shape[1:]), offset, segment))
    for t, base, moved, a in _states(affine, x, params, scale, offset):
        h = (base + moved) + a
        if segment == 1:
            saved[t - 1, 0] = h
        elif segment > 1 and (t - 1) % segment == 0 and (t - 1) // segment < saved.shape[0]:
            saved[(t - 1) // segment] = torch.stack((moved, a)) if offset else h
    z = affine.apply(last_weight, h) + _column(last_bias, h)
    if offset:
        z = (moved + a)[width - outputs :] + z
    return _pool(z), saved


def backward(
    affine: Affine,
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
    x = x.movedim(0, -1)
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    inputs, outputs, width = x.shape[0], *last_weight.shape[:2]
    grads = [torch.empty_like(p) for p in params]
    states = [(base + moved) + a for _, base, moved, a in _states(affine, x, params, scale, offset)]
    _, _, keep = _identity(x, width, outputs, scale, offset)
    r, big_r = _output_gradient(grad_out, x, width, offset)
    moved, h = torch.zeros_like(big_r), states[-1]
    grads[4], grads[5] = affine.weight_grad(last_weight, r, h), _sum(r)
    g = torch.where(h <= 0, -big_r, affine.transpose(last_weight, r))
    moved, g, grads[2], grads[3] = _retreated(affine, big_r, moved, g, keep, states, hidden_weight, 1, offset)
    full = (big_r + moved) + g
    grads[0], grads[1] = affine.weight_grad(first_weight, full, x), _sum(full)
    grad_x = affine.transpose(first_weight, full)
    if offset:
        grad_x = grad_x + scale * full[:inputs]
    empty = x.new_empty(0)
    return (
        grad_x.movedim(-1, 0).contiguous() if need_input else empty,
        *(grads if need_params else [empty.clone() for _ in grads]),
    )


def _entered(
    state: Tensor, x: Tensor, outputs: int, scale: float, offset: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``(base, moved, a, keep)`` of a state given as ``(moved, a)`` or h; ``x`` has the batch last."""
    base, _, keep = _identity(x, state.shape[1], outputs, scale, offset)
    return base, state[0] if offset else torch.zeros_like(base), state[-1], keep


def advance(
    affine: Affine,
    state: Tensor,
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    outputs: int,
    scale: float,
    offset: bool,
    first: int,
    segment: int,
) -> tuple[Tensor, Tensor]:
    """Hidden layers alone: from state ``first`` to state ``first + m``, m = ``hidden_weight.shape[0]`` >= 1.

    ``state`` is ``(moved, a)`` in offset form, shape (2, n, *positions, B), and h in plain form, (1, n, *positions, B):
    a row of what ``forward`` saves with segment 2 or more. Returns the last state in the same form, and what
    ``retreat`` needs (see ``advance_saved_shape``). ``x`` is the chain's input, (B, in, *positions), and ``outputs``
    the number of its outputs: the base depends on them.
    """
    x = x.movedim(0, -1)
    base, moved, a, keep = _entered(state, x, outputs, scale, offset)
    saved = x.new_empty(advance_saved_shape(hidden_weight.shape[0], tuple(state.shape[1:]), offset, segment))
    after = state
    for t, m, rest in _advanced(affine, base, moved, a, keep, hidden_weight, hidden_bias, first, offset):
        after = torch.stack((m, rest)) if offset else rest.unsqueeze(0).clone()
        row, off = divmod(t - first, segment) if segment else (0, 1)
        if off == 0 and 1 <= row <= saved.shape[0]:
            saved[row - 1] = after if segment > 1 else (base + m) + rest
    return after, saved


def retreat(
    affine: Affine,
    grad_state: Tensor,
    grad_out: Tensor,
    state: Tensor,
    x: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    saved: Tensor,
    outputs: int,
    scale: float,
    offset: bool,
    first: int,
    segment: int,
    need_params: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The way back of ``advance``: from the gradient at state ``first + m`` to that at state ``first``.

    ``grad_state`` is ``(moved, g)`` in offset form and g in plain form, the shape of ``state``: the gradient
    ``G = (R + moved) + g`` with respect to the pre-activation of its state, so after the mask of its ReLU, and after
    its move if one is due there. ``grad_out`` is the gradient of the chain's output, (B, out), from which R is made;
    ``state`` is state ``first``; ``saved`` is not read here: the states are computed again.

    Returns: the gradient at state ``first`` in the same form, and those of hidden_weight and hidden_bias, or two empty
        tensors of shape (0,).
    """
    x = x.movedim(0, -1)
    base, moved, a, keep = _entered(state, x, outputs, scale, offset)
    forward = _advanced(affine, base, moved, a, keep, hidden_weight, hidden_bias, first, offset)
    states = [(base + h_moved) + h_a for _, h_moved, h_a in forward]
    _, big_r = _output_gradient(grad_out, x, state.shape[1], offset)
    g_moved = grad_state[0] if offset else torch.zeros_like(big_r)
    g_moved, g, *grads = _retreated(affine, big_r, g_moved, grad_state[-1], keep, states, hidden_weight, first, offset)
    if not need_params:
        grads = [x.new_empty(0), x.new_empty(0)]
    return torch.stack((g_moved, g)) if offset else g.unsqueeze(0).clone(), grads[0], grads[1]


def jvp(
    affine: Affine,
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
    """Directional derivative of the forward's output, shape (B, out); ``None`` stands for a zero tangent.

    The tangent is carried in three parts as well, ``T = (D + moved) + tau`` with D = ``[scale relu'(x) x_t; 0; 0]``.
    """
    x = x.movedim(0, -1)
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    inputs, outputs, width = x.shape[0], *last_weight.shape[:2]
    _, _, keep = _identity(x, width, outputs, scale, offset)
    d = x.new_zeros(width, *x.shape[1:])
    moved, tau = torch.zeros_like(d), torch.zeros_like(d)
    h_before = x
    if x_t is not None:
        x_t = x_t.movedim(0, -1)
        tau = affine.apply(first_weight, x_t)
        if offset:
            left = scale * x_t
            d[:inputs] = torch.where(x <= 0, torch.zeros_like(left), left)
            tau[:inputs] += torch.where(x <= 0, left, torch.zeros_like(left))
    if first_weight_t is not None:
        tau = tau + affine.apply(first_weight_t, h_before)
    if first_bias_t is not None:
        tau = tau + _column(first_bias_t, tau)
    for t, base, h_moved, a in _states(affine, x, params, scale, offset):
        h = (base + h_moved) + a
        if t > 1:
            full = (d + moved) + tau
            tau = _kept(keep, tau) + affine.apply(hidden_weight[t - 2], full)
            if hidden_weight_t is not None:
                tau = tau + affine.apply(hidden_weight_t[t - 2], h_before)
            if hidden_bias_t is not None:
                tau = tau + _column(hidden_bias_t[t - 2], tau)
        tau = torch.where(h <= 0, -(d + moved), tau)
        if offset and t > 1 and (t - 1) % MOVE_PERIOD == 0:
            moved, tau = _move(d, moved, tau, keep)
        h_before = h
    z_t = affine.apply(last_weight, (d + moved) + tau)
    if offset:
        z_t = (moved + tau)[width - outputs :] + z_t
    if last_weight_t is not None:
        z_t = z_t + affine.apply(last_weight_t, h_before)
    if last_bias_t is not None:
        z_t = z_t + _column(last_bias_t, z_t)
    return _pool(z_t)
