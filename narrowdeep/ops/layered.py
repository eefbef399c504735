"""A chain one layer at a time in torch's own operators, in place: for layers too wide to fuse, on any device.

The same results as ``reference.py``, with the memory of a fused chain: states are saved every ``segment`` layers and
computed again in the backward, no autograd graph. One layer is a matrix product (cuBLAS on a GPU) and three or four
elementwise operations. Symbols as in ``reference.py``. The Triton kernels enter and leave a chain here as well:
``first_state``, ``last_output``, ``last_gradient`` and their likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowdeep.ops.precision import at_full_precision
from narrowdeep.ops.reference import MOVE_PERIOD, advance_saved_shape, saved_shape, two_sum

Params = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Layer:
    """The linear map of one layer, into memory of the caller. States are (n, *positions, B)."""

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(weight, h, out): out = W h"""
    transpose: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(weight, g, out): out = W^T g"""
    weight_grad: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(g, h, out): out = the gradient of a weight of out's shape"""


class Parts:
    """``(base + moved) + a``, or ``a`` alone in plain form (``base`` None). Also R + moved + g and D + moved + tau."""

    def __init__(self, base: Tensor | None, a: Tensor, middle: int, moved: Tensor | None = None) -> None:
        self.base, self.a, self.middle = base, a, middle
        if base is not None:
            self.moved = torch.zeros_like(base) if moved is None else moved.clone()
            self.total = base + self.moved
            self.floor = -self.total
        else:
            self.floor = a.new_zeros(())

    def full(self, out: Tensor) -> Tensor:
        """The whole value, in ``out``."""
        if self.base is None:
            return out.copy_(self.a)
        return torch.add(self.total, self.a, out=out)

    def add_kept(self, z: Tensor) -> Tensor:
        """z += E a. Spends a: its middle unit is set to 0."""
        if self.base is not None:
            self.a[self.middle].zero_()
            z.add_(self.a)
        return z

    def clip(self, z: Tensor) -> None:
        """a = max(z, -total); a NaN stays one."""
        torch.maximum(z, self.floor, out=self.a)

    def mask(self, dead: Tensor, grad: Tensor) -> None:
        """a = grad, but where the ReLU is ``dead`` whatever makes the whole exactly 0."""
        torch.where(dead, self.floor, grad, out=self.a)

    def move(self) -> None:
        """``reference._move``: a into moved by an exact two-sum, but for the middle unit."""
        if self.base is None:
            return
        total, rest = two_sum(self.moved, self.a)
        dead = self.total + self.a == 0
        total = torch.where(dead, -self.base, total)
        rest.masked_fill_(dead, 0)
        total[self.middle], rest[self.middle] = self.moved[self.middle], self.a[self.middle]
        self.moved, self.a = total, rest
        torch.add(self.base, self.moved, out=self.total)
        torch.neg(self.total, out=self.floor)

    def right(self, outputs: int) -> Tensor:
        """What the identity part of the last layer passes on, without the base."""
        return (self.moved + self.a)[-outputs:]


def _column(bias: Tensor, like: Tensor) -> Tensor:
    return bias.reshape(-1, *(1 for _ in like.shape[1:]))


def _bias_grad(g: Tensor, out: Tensor) -> Tensor:
    return torch.sum(g.reshape(g.shape[0], math.prod(g.shape[1:])), dim=1, out=out)


def _new_state(x: Tensor, width: int) -> Tensor:
    return x.new_empty(width, *x.shape[1:])


def first_state(layer: Layer, x: Tensor, params: Params, scale: float, offset: bool) -> Parts:
    """State 1; ``x`` is (in, *positions, B)."""
    weight, bias, *_, last_weight, _ = params
    (width, inputs), outputs = weight.shape[:2], last_weight.shape[0]
    a = layer.apply(weight, x, _new_state(x, width)).add_(_column(bias, x))
    if not offset:
        return Parts(None, a.clamp_(min=0), inputs)
    base = _base(x, width, outputs, scale)
    a[:inputs] += (scale * x).clamp_(max=0)
    return Parts(base, torch.maximum(a, -base), inputs)


def _base(x: Tensor, width: int, outputs: int, scale: float) -> Tensor:
    base = x.new_zeros(width, *x.shape[1:])
    torch.clamp(scale * x, min=0, out=base[: x.shape[0]])
    base[width - outputs :] = scale
    return base


def pool(z: Tensor) -> Tensor:
    """The mean over positions, (out, *positions, B) -> (B, out)."""
    positions = math.prod(z.shape[1:-1])
    return (z.reshape(z.shape[0], positions, z.shape[-1]).sum(1) / positions).t().contiguous()


def last_output(layer: Layer, state: Parts, h: Tensor, last_weight: Tensor, last_bias: Tensor) -> Tensor:
    """The chain's output from its last state, whose value is ``h``."""
    z = layer.apply(last_weight, h, _new_state(h, last_weight.shape[0])).add_(_column(last_bias, h))
    return pool(z if state.base is None else z.add_(state.right(last_weight.shape[0])))


def last_gradient(layer: Layer, grad_out: Tensor, h: Tensor, last_weight: Tensor, offset: bool) -> tuple[Tensor, Parts]:
    """(r, parts): the gradient of the last layer's output, the same at every position, and of its input h.

    ``parts.a`` is the gradient with respect to h itself: it still has to pass h's ReLU.
    """
    outputs, width = last_weight.shape[:2]
    r = _output_gradient(grad_out, h).contiguous()
    base = _root(r, width) if offset else None
    return r, Parts(base, layer.transpose(last_weight, r, torch.empty_like(h)), width - outputs - 1)


def _output_gradient(grad_out: Tensor, like: Tensor) -> Tensor:
    """r, (out, *positions, B): every position of ``like`` has the same share in the output."""
    r = grad_out.t() / math.prod(like.shape[1:-1])
    outputs, batch = r.shape
    return r.reshape(outputs, *(1 for _ in like.shape[1:-1]), batch).expand(outputs, *like.shape[1:])


def _root(r: Tensor, width: int) -> Tensor:
    """R = [0; 0; r]."""
    root = r.new_zeros(width, *r.shape[1:])
    root[width - r.shape[0] :] = r
    return root


def first_gradients(
    layer: Layer,
    full: Tensor,
    x: Tensor,
    params: Params,
    grads: list[Tensor],
    scale: float,
    offset: bool,
    need_input: bool,
) -> Tensor:
    """Gradients of first_weight and first_bias into ``grads`` (if any); returns that of x, (B, in, *positions)."""
    if grads:
        layer.weight_grad(full, x, grads[0])
        _bias_grad(full, grads[1])
    if not need_input:
        return full.new_empty(0)
    grad_x = layer.transpose(params[0], full, torch.empty_like(x))
    if offset:
        grad_x.add_(full[: x.shape[0]], alpha=scale)
    return grad_x.movedim(-1, 0).contiguous()


def last_gradients(layer: Layer, r: Tensor, h: Tensor, grads: list[Tensor]) -> None:
    """Gradients of last_weight and last_bias into ``grads``."""
    layer.weight_grad(r, h, grads[4])
    _bias_grad(r, grads[5])


def first_tangent(
    layer: Layer,
    x: Tensor,
    h: Tensor,
    params: Params,
    tangents: tuple[Tensor | None, ...],
    scale: float,
    offset: bool,
) -> Parts:
    """Tangent of state 1, whose value is ``h``. ``tangents`` are those of x, first_weight and first_bias."""
    x_t, weight_t, bias_t = tangents
    inputs = x.shape[0]
    tau, base = torch.zeros_like(h), torch.zeros_like(h) if offset else None
    if x_t is not None:
        layer.apply(params[0], x_t, tau)
        if base is not None:
            left = scale * x_t
            base[:inputs] = left.masked_fill(x <= 0, 0)
            tau[:inputs] += left.masked_fill(x > 0, 0)
    if weight_t is not None:
        tau.add_(layer.apply(weight_t, x, torch.empty_like(h)))
    if bias_t is not None:
        tau.add_(_column(bias_t, h))
    parts = Parts(base, tau, inputs)
    parts.mask(h <= 0, tau.clone())
    return parts


def last_tangent(
    layer: Layer, tangent: Parts, full: Tensor, h: Tensor, params: Params, tangents: tuple[Tensor | None, ...]
) -> Tensor:
    """The output's tangent from the last state ``h`` and its tangent ``full``; last_weight's and last_bias's."""
    weight_t, bias_t = tangents
    outputs = params[4].shape[0]
    z_t = layer.apply(params[4], full, _new_state(h, outputs))
    if tangent.base is not None:
        z_t.add_(tangent.right(outputs))
    if weight_t is not None:
        z_t.add_(layer.apply(weight_t, h, torch.empty_like(z_t)))
    if bias_t is not None:
        z_t.add_(_column(bias_t, h))
    return pool(z_t)


def _step(layer: Layer, state: Parts, weight: Tensor, bias: Tensor, h: Tensor, z: Tensor, s: int) -> None:
    """State s to state s + 1 (numbered from 0 here); ``h`` holds the value of state s, ``z`` is room."""
    layer.apply(weight, h, z).add_(_column(bias, h))
    state.clip(state.add_kept(z))
    if (s + 1) % MOVE_PERIOD == 0:
        state.move()


@at_full_precision
def forward(
    layer: Layer,
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
    """As ``reference.forward``."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    x = x.movedim(0, -1)
    layers = hidden_weight.shape[0]
    state = first_state(layer, x, params, scale, offset)
    saved = x.new_empty(saved_shape(layers + 2, tuple(state.a.shape), offset, segment))
    h, z = torch.empty_like(state.a), torch.empty_like(state.a)
    for s in range(layers + 1):
        state.full(out=h)
        if segment == 1:
            saved[s, 0] = h
        elif segment > 1 and s % segment == 0 and s // segment < saved.shape[0]:
            saved[s // segment, -1] = state.a
            if offset:
                saved[s // segment, 0] = state.moved
        if s < layers:
            _step(layer, state, hidden_weight[s], hidden_bias[s], h, z, s)
    return last_output(layer, state, h, last_weight, last_bias), saved


@at_full_precision
def backward(
    layer: Layer,
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
    """As ``reference.backward``, from ``saved``; with segment 0 the forward runs again first."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    layers = hidden_weight.shape[0]
    if segment == 0:
        segment = max(2, math.isqrt(layers))
        saved = forward(layer, x, *params, scale, offset, segment)[1]
    x = x.movedim(0, -1)
    grads = [torch.empty_like(p) for p in params] if need_params else []
    base = first_state(layer, x, params, scale, offset).base
    shape = saved.shape[2:]
    z, full = x.new_empty(shape), x.new_empty(shape)
    scratch = x.new_empty(0) if segment == 1 else x.new_empty(min(segment, layers) + 1, *shape)

    def states(start: int, stop: int) -> Tensor:
        """Values of states start .. stop (numbered from 0)."""
        if segment == 1:
            return saved[start : stop + 1, 0]
        parts = saved[start // segment]
        state = Parts(base, parts[-1].clone(), x.shape[0], parts[0] if offset else None)
        for s in range(start, stop):
            h = state.full(out=scratch[s - start])
            _step(layer, state, hidden_weight[s], hidden_bias[s], h, z, s)
        state.full(out=scratch[stop - start])
        return scratch

    gradient, stop = None, layers
    for start in range((layers - 1) // segment * segment if layers else 0, -1, -segment):
        h = states(start, stop)
        if gradient is None:
            r, gradient = last_gradient(layer, grad_out, h[stop - start], last_weight, offset)
            gradient.mask(h[stop - start] <= 0, gradient.a.clone())
            if need_params:
                last_gradients(layer, r, h[stop - start], grads)
        _reverse(layer, gradient, h, hidden_weight, grads[2:4], start, stop, 0, full, z)
        stop = start
    assert gradient is not None
    gradient.full(out=full)
    grad_x = first_gradients(layer, full, x, params, grads, scale, offset, need_input)
    return (grad_x, *(grads or [x.new_empty(0) for _ in params]))


def _reverse(
    layer: Layer,
    gradient: Parts,
    states: Tensor | Sequence[Tensor],
    hidden_weight: Tensor,
    grads: Sequence[Tensor],
    start: int,
    stop: int,
    before: int,
    full: Tensor,
    z: Tensor,
) -> None:
    """``gradient`` from state ``stop`` to state ``start`` (from 0), whose values and its followers' are ``states``.

    ``before``: layers of the chain that stand before the first of ``hidden_weight``. Gradients of both parameters go
    into ``grads``, if any; ``full`` and ``z`` are room.
    """
    for s in range(stop, start, -1):
        gradient.full(out=full)
        h = states[s - 1 - start]
        if grads:
            layer.weight_grad(full, h, grads[0][s - 1 - before])
            _bias_grad(full, grads[1][s - 1 - before])
        layer.transpose(hidden_weight[s - 1 - before], full, z)
        gradient.mask(h <= 0, gradient.add_kept(z))
        if s % MOVE_PERIOD == 0:
            gradient.move()


def entered(state: Tensor, x: Tensor, outputs: int, scale: float, offset: bool) -> Parts:
    """A state given as ``(moved, a)`` or h; ``x`` is (in, *positions, B)."""
    base = _base(x, state.shape[1], outputs, scale) if offset else None
    return Parts(base, state[-1].clone(), x.shape[0], state[0] if offset else None)


def entered_gradient(grad_state: Tensor, grad_out: Tensor, inputs: int, offset: bool) -> Parts:
    """The gradient of a state given as ``(moved, g)`` or g; ``grad_out`` is that of the chain's output, (B, out)."""
    root = None
    if offset:
        root = _root(_output_gradient(grad_out, grad_state[0]), grad_state.shape[1])
    return Parts(root, grad_state[-1].clone(), inputs, grad_state[0] if offset else None)


def left(parts: Parts) -> Tensor:
    """``(moved, a)`` in offset form, ``a`` alone in plain form: (2 or 1, n, *positions, B)."""
    return parts.a.unsqueeze(0).clone() if parts.base is None else torch.stack((parts.moved, parts.a))


@at_full_precision
def advance(
    layer: Layer,
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
    """As ``reference.advance``."""
    layers = hidden_weight.shape[0]
    parts = entered(state, x.movedim(0, -1), outputs, scale, offset)
    saved = x.new_empty(advance_saved_shape(layers, tuple(parts.a.shape), offset, segment))
    h, z = torch.empty_like(parts.a), torch.empty_like(parts.a)
    for j in range(layers):
        parts.full(out=h)
        if segment and j and j % segment == 0:
            saved[j // segment - 1] = h if segment == 1 else left(parts)
        _step(layer, parts, hidden_weight[j], hidden_bias[j], h, z, first - 1 + j)
    return left(parts), saved


@at_full_precision
def retreat(
    layer: Layer,
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
    """As ``reference.retreat``, from ``saved``; with segment 0 the layers are advanced again first."""
    layers, before = hidden_weight.shape[0], first - 1
    if segment == 0:
        segment = max(2, math.isqrt(layers))
        saved = advance(layer, state, x, hidden_weight, hidden_bias, outputs, scale, offset, first, segment)[1]
    x = x.movedim(0, -1)
    shape = state.shape[1:]
    h, z, full = x.new_empty(shape), x.new_empty(shape), x.new_empty(shape)
    scratch = x.new_empty(0) if segment == 1 else x.new_empty(min(segment, layers), *shape)
    gradient = entered_gradient(grad_state, grad_out, x.shape[0], offset)
    grads = [torch.empty_like(hidden_weight), torch.empty_like(hidden_bias)] if need_params else []

    def states(start: int, stop: int) -> Sequence[Tensor]:
        """Values of states start .. stop - 1 of these layers (numbered from 0)."""
        if segment == 1:
            return [saved[start - 1, 0] if start else entered(state, x, outputs, scale, offset).full(out=h)]
        parts = entered(saved[start // segment - 1] if start else state, x, outputs, scale, offset)
        parts.full(out=scratch[0])
        for j in range(start, stop - 1):
            _step(layer, parts, hidden_weight[j], hidden_bias[j], scratch[j - start], z, before + j)
            parts.full(out=scratch[j + 1 - start])
        return list(scratch)

    stop = layers
    for start in range((layers - 1) // segment * segment, -1, -segment):
        values = states(start, stop)
        _reverse(layer, gradient, values, hidden_weight, grads, before + start, before + stop, before, full, z)
        stop = start
    grad_weight, grad_bias = grads or (x.new_empty(0), x.new_empty(0))
    return left(gradient), grad_weight, grad_bias


@at_full_precision
def jvp(
    layer: Layer,
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
    """As ``reference.jvp``."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    x = x.movedim(0, -1)
    x_t = None if x_t is None else x_t.movedim(0, -1)
    state = first_state(layer, x, params, scale, offset)
    h, z = torch.empty_like(state.a), torch.empty_like(state.a)
    full, dz = torch.empty_like(h), torch.empty_like(h)
    state.full(out=h)
    tangent = first_tangent(layer, x, h, params, (x_t, first_weight_t, first_bias_t), scale, offset)
    for s in range(hidden_weight.shape[0]):
        layer.apply(hidden_weight[s], tangent.full(out=full), dz)
        tangent.add_kept(dz)
        if hidden_weight_t is not None:
            dz.add_(layer.apply(hidden_weight_t[s], h, full))
        if hidden_bias_t is not None:
            dz.add_(_column(hidden_bias_t[s], dz))
        _step(layer, state, hidden_weight[s], hidden_bias[s], h, z, s)
        tangent.mask(state.full(out=h) <= 0, dz)
        if (s + 1) % MOVE_PERIOD == 0:
            tangent.move()
    return last_tangent(layer, tangent, tangent.full(out=full), h, params, (last_weight_t, last_bias_t))
