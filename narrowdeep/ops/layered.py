"""A span of a chain one layer at a time in torch's own operators, in place: for layers too wide to fuse, on any device.

The same results as the fused kernels, with their memory: checkpoints every ``segment`` layers, computed again in the
backward, no autograd graph. One layer is a matrix product (cuBLAS on a GPU) or a convolution, and three or four
elementwise operations, in full precision whatever torch's global modes say. Symbols as in ``narrowdeep.ops.reference``,
arguments as in ``narrowdeep.ops.chain``. The Triton kernels enter and leave a chain here as well: ``first_state``,
``last_output``, ``last_gradient`` and their likes. More than 400 lines, because an op's arguments take one each.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowdeep.ops.params import Affine, BackwardArgs, ForwardArgs, JvpArgs
from narrowdeep.ops.precision import at_full_precision
from narrowdeep.ops.reference import RENORMALISE_PERIOD, saved_shape, two_sum


@dataclass(frozen=True)
class Layer:
    """The linear map of one layer, into memory of the caller. States are (n, *positions, B)."""

    apply: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(weight, h, out): out = W h"""
    transpose: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(weight, g, out): out = W^T g"""
    weight_grad: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(g, h, out): out = the gradient of a weight of out's shape"""


class HiLo:
    """``(base + hi) + lo``, or ``lo`` alone in plain form (``base`` None): a state, its gradient or its tangent."""

    def __init__(self, base: Tensor | None, lo: Tensor, middle: int, hi: Tensor | None = None) -> None:
        self.base, self.lo, self.middle = base, lo, middle
        if base is not None:
            self.hi = torch.zeros_like(base) if hi is None else hi.clone()
            self.total = base + self.hi

    @functools.cached_property
    def floor(self) -> Tensor:
        """Where lo makes the whole 0."""
        return self.lo.new_zeros(()) if self.base is None else -self.total

    def clone(self) -> HiLo:
        """The same in memory of its own, but for ``base``."""
        return HiLo(self.base, self.lo.clone(), self.middle, None if self.base is None else self.hi)

    def full(self, out: Tensor) -> Tensor:
        """The whole value, in ``out``."""
        if self.base is None:
            return out.copy_(self.lo)
        return torch.add(self.total, self.lo, out=out)

    def add_skip(self, z: Tensor) -> Tensor:
        """z += E lo. Spends lo: its middle unit is set to 0."""
        if self.base is not None:
            self.lo[self.middle].zero_()
            z.add_(self.lo)
        return z

    def clip(self, z: Tensor) -> None:
        """lo = max(z, -total); a NaN stays one."""
        torch.maximum(z, self.floor, out=self.lo)

    def mask(self, dead: Tensor, grad: Tensor) -> None:
        """lo = grad, but where the ReLU is ``dead`` whatever makes the whole exactly 0."""
        torch.where(dead, self.floor, grad, out=self.lo)

    def renormalise(self) -> None:
        """``reference.renormalise``: lo into hi by an exact two-sum, but for the middle unit."""
        if self.base is None:
            return
        total, rest = two_sum(self.hi, self.lo)
        dead = self.total + self.lo == 0
        total = torch.where(dead, -self.base, total)
        rest.masked_fill_(dead, 0)
        total[self.middle], rest[self.middle] = self.hi[self.middle], self.lo[self.middle]
        self.hi, self.lo = total, rest
        torch.add(self.base, self.hi, out=self.total)
        torch.neg(self.total, out=self.floor)

    def right(self, outputs: int) -> Tensor:
        """What the identity part of the last layer passes on, without the base."""
        return (self.hi + self.lo)[-outputs:]

    def state(self) -> Tensor:
        """As spans hand it on: ``(base, hi, lo)``, (3, n, *positions, B), or ``lo`` alone, (1, n, *positions, B)."""
        return self.lo.unsqueeze(0).clone() if self.base is None else torch.stack((self.base, self.hi, self.lo))


def entered(state: Tensor, outputs: int) -> HiLo:
    """The way back from ``HiLo.state``."""
    middle = state.shape[1] - outputs - 1
    if state.shape[0] == 1:
        return HiLo(None, state[0].clone(), middle)
    return HiLo(state[0], state[2].clone(), middle, state[1])


def _restored(base: Tensor | None, row: Tensor, middle: int) -> HiLo:
    """A state from a row of what the forward saves: ``(hi, lo)`` beside its ``base``, or h."""
    return HiLo(base, row[-1].clone(), middle, None if base is None else row[0])


def _column(bias: Tensor, like: Tensor) -> Tensor:
    return bias.reshape(-1, *(1 for _ in like.shape[1:]))


def _bias_grad(g: Tensor, out: Tensor) -> Tensor:
    return torch.sum(g.reshape(g.shape[0], math.prod(g.shape[1:])), dim=1, out=out)


def _new_state(x: Tensor, width: int) -> Tensor:
    return x.new_empty(width, *x.shape[1:])


def first_state(
    layer: Layer, x: Tensor, weight: Tensor, bias: Tensor, outputs: int, scale: float, offset: bool
) -> HiLo:
    """State 0; ``x`` is (in, *positions, B)."""
    width, inputs = weight.shape[:2]
    lo = layer.apply(weight, x, _new_state(x, width)).add_(_column(bias, x))
    middle = width - outputs - 1
    if not offset:
        return HiLo(None, lo.clamp_(min=0), middle)
    base = base_of(x, width, outputs, scale)
    lo[:inputs].add_((scale * x).clamp_(max=0))
    return HiLo(base, torch.maximum(lo, -base), middle)


def base_of(x: Tensor, width: int, outputs: int, scale: float) -> Tensor:
    """``[scale relu(x); 0; scale]``."""
    base = x.new_zeros(width, *x.shape[1:])
    torch.clamp(scale * x, min=0, out=base[: x.shape[0]])
    base[width - outputs :] = scale
    return base


def pool(z: Tensor) -> Tensor:
    """The mean over positions, (out, *positions, B) -> (B, out)."""
    if z.dim() == 2:
        return z.t().contiguous()
    positions = math.prod(z.shape[1:-1])
    return (z.reshape(z.shape[0], positions, z.shape[-1]).sum(1) / positions).t().contiguous()


def last_output(layer: Layer, state: HiLo, h: Tensor, last_weight: Tensor, last_bias: Tensor) -> Tensor:
    """The chain's output from its last state, whose value is ``h``."""
    z = layer.apply(last_weight, h, _new_state(h, last_weight.shape[0])).add_(_column(last_bias, h))
    return pool(z if state.base is None else z.add_(state.right(last_weight.shape[0])))


def last_gradient(layer: Layer, grad_out: Tensor, h: Tensor, last_weight: Tensor, offset: bool) -> tuple[Tensor, HiLo]:
    """(r, gradient): the gradient of the last layer's output, the same at every position, and of its input h.

    ``gradient.lo`` is the gradient with respect to h itself: it still has to pass h's ReLU.
    """
    outputs, width = last_weight.shape[:2]
    r = _output_gradient(grad_out, h).contiguous()
    base = _root(r, width) if offset else None
    return r, HiLo(base, layer.transpose(last_weight, r, torch.empty_like(h)), width - outputs - 1)


def _output_gradient(grad_out: Tensor, like: Tensor) -> Tensor:
    """r, (out, *positions, B): every position of ``like`` has the same share in the output."""
    if like.dim() == 2:
        return grad_out.t()
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
    first_weight: Tensor,
    grads: Sequence[Tensor],
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
    grad_x = layer.transpose(first_weight, full, torch.empty_like(x))
    if offset:
        grad_x.add_(full[: x.shape[0]], alpha=scale)
    return grad_x.movedim(-1, 0).contiguous()


def last_gradients(layer: Layer, r: Tensor, h: Tensor, grads: Sequence[Tensor]) -> None:
    """Gradients of last_weight and last_bias into ``grads``."""
    layer.weight_grad(r, h, grads[0])
    _bias_grad(r, grads[1])


def first_tangent(
    layer: Layer,
    x: Tensor,
    h: Tensor,
    first_weight: Tensor,
    outputs: int,
    tangents: tuple[Tensor | None, ...],
    scale: float,
    offset: bool,
) -> HiLo:
    """Tangent of state 0, whose value is ``h``. ``tangents`` are those of x, first_weight and first_bias."""
    x_t, weight_t, bias_t = tangents
    inputs = x.shape[0]
    lo, base = torch.zeros_like(h), torch.zeros_like(h) if offset else None
    if x_t is not None:
        layer.apply(first_weight, x_t, lo)
        if base is not None:
            left = scale * x_t
            base[:inputs] = left.masked_fill(x <= 0, 0)
            lo[:inputs] += left.masked_fill(x > 0, 0)
    if weight_t is not None:
        lo.add_(layer.apply(weight_t, x, torch.empty_like(h)))
    if bias_t is not None:
        lo.add_(_column(bias_t, h))
    tangent = HiLo(base, lo, h.shape[0] - outputs - 1)
    tangent.mask(h <= 0, lo.clone())
    return tangent


def last_tangent(
    layer: Layer, tangent: HiLo, full: Tensor, h: Tensor, last_weight: Tensor, tangents: tuple[Tensor | None, ...]
) -> Tensor:
    """The output's tangent from the last state ``h`` and its tangent ``full``; last_weight's and last_bias's."""
    weight_t, bias_t = tangents
    outputs = last_weight.shape[0]
    z_t = layer.apply(last_weight, full, _new_state(h, outputs))
    if tangent.base is not None:
        z_t.add_(tangent.right(outputs))
    if weight_t is not None:
        z_t.add_(layer.apply(weight_t, h, torch.empty_like(z_t)))
    if bias_t is not None:
        z_t.add_(_column(bias_t, h))
    return pool(z_t)


def _step(layer: Layer, state: HiLo, weight: Tensor, bias: Tensor, h: Tensor, z: Tensor, after: int) -> None:
    """One hidden layer, to state ``after``; ``h`` holds the value of the state before, ``z`` is room."""
    layer.apply(weight, h, z).add_(_column(bias, h))
    state.clip(state.add_skip(z))
    if after % RENORMALISE_PERIOD == 0:
        state.renormalise()


def initial(layer: Layer, input: Tensor, first: Affine | None, scale: float, offset: bool, outputs: int) -> HiLo:
    """The state before the first hidden layer: what the first layer makes of x, or the state that is given."""
    if first is None:
        return entered(input, outputs)
    return first_state(layer, input.movedim(0, -1), *first, outputs, scale, offset)


@at_full_precision
def forward(layer: Layer, *args: Any) -> tuple[Tensor, Tensor]:
    """(output, saved) of a span."""
    input, params, (scale, offset, outputs, start), segment = ForwardArgs.of(args)
    first, hidden, last = params
    state = initial(layer, input, first, scale, offset, outputs)
    layers, ends = params.layers, (first is not None, last is not None)
    saved = state.lo.new_empty(saved_shape(layers, tuple(state.lo.shape), offset, segment, *ends))
    h, z = torch.empty_like(state.lo), torch.empty_like(state.lo)
    for j in range(layers + 1):
        state.full(out=h)
        row, between = divmod(j, segment) if segment else (0, 1)
        row -= first is None
        if between == 0 and 0 <= row < saved.shape[0]:
            saved[row, -1] = h if segment == 1 else state.lo
            if offset and segment > 1:
                saved[row, 0] = state.hi
        if j < layers:
            _step(layer, state, hidden.weight[j], hidden.bias[j], h, z, start + j + 1)
    return (state.state() if last is None else last_output(layer, state, h, *last)), saved


@at_full_precision
def backward(layer: Layer, *args: Any) -> tuple[Tensor, ...]:
    """(gradient of input, gradients of the six parameters); with segment 0 the forward runs again first."""
    grad, input, params, saved, settings, segment, need_input, need_params = BackwardArgs.of(args)
    (scale, offset, outputs, start), (first, hidden, last) = settings, params
    layers, width = hidden.weight.shape[:2]
    if segment == 0:
        segment = max(2, math.isqrt(layers))
        saved = forward(layer, input, *params.flat(), *settings, segment)[1]
    grads = [input.new_empty(0 if p is None or not need_params else p.shape) for p in params.flat()]
    hidden_grads = grads[2:4] if need_params else []
    middle = width - outputs - 1
    if first is None:
        base, skipped = (input[0] if offset else None), 1
    else:
        x = input.movedim(0, -1)
        base, skipped = (base_of(x, width, outputs, scale) if offset else None), 0
    shape = saved.shape[2:]
    h_given, z, full = input.new_empty(shape), input.new_empty(shape), input.new_empty(shape)
    scratch = [] if segment == 1 else list(input.new_empty(min(segment, layers) + 1, *shape))

    def states(begin: int, end: int) -> Sequence[Tensor]:
        """Values of the states ``begin`` .. ``end``, counted from the span's first."""
        given = begin == 0 and first is None
        if segment == 1:
            rows = [saved[j - skipped, 0] for j in range(begin + given, end + 1)]
            return [entered(input, outputs).full(out=h_given), *rows] if given else rows
        state = entered(input, outputs) if given else _restored(base, saved[begin // segment - skipped], middle)
        state.full(out=scratch[0])
        for j in range(begin, end):
            h = scratch[j - begin]
            _step(layer, state, hidden.weight[j], hidden.bias[j], h, z, start + j + 1)
            state.full(out=scratch[j + 1 - begin])
        return scratch

    gradient = None if last is not None else entered(grad, outputs)
    end = layers
    for begin in range((layers - 1) // segment * segment if layers else 0, -1, -segment):
        # The state after the last hidden layer is wanted by the last layer alone.
        h = states(begin, end) if gradient is None else states(begin, end - 1) if begin < end else ()
        if gradient is None:
            assert last is not None
            r, gradient = last_gradient(layer, grad, h[end - begin], last.weight, offset)
            gradient.mask(h[end - begin] <= 0, gradient.lo.clone())
            if need_params:
                last_gradients(layer, r, h[end - begin], grads[4:])
        _step_back(layer, gradient, h, hidden.weight, hidden_grads, begin, end, start, full, z)
        end = begin
    assert gradient is not None
    if first is None:
        return gradient.state() if need_input else input.new_empty(0), *grads
    gradient.full(out=full)
    ends = grads[:2] if need_params else []
    return first_gradients(layer, full, x, first.weight, ends, scale, offset, need_input), *grads


def _step_back(
    layer: Layer,
    gradient: HiLo,
    states: Sequence[Tensor],
    hidden_weight: Tensor,
    grads: Sequence[Tensor],
    begin: int,
    end: int,
    start: int,
    full: Tensor,
    z: Tensor,
) -> None:
    """``gradient`` from state ``end`` to state ``begin``, counted from the span's first, whose values are ``states``.

    Gradients of both parameters go into ``grads``, if any; ``full`` and ``z`` are room.
    """
    for j in range(end - 1, begin - 1, -1):
        gradient.full(out=full)
        h = states[j - begin]
        if grads:
            layer.weight_grad(full, h, grads[0][j])
            _bias_grad(full, grads[1][j])
        layer.transpose(hidden_weight[j], full, z)
        gradient.mask(h <= 0, gradient.add_skip(z))
        if (start + j + 1) % RENORMALISE_PERIOD == 0:  # the layers after which the forward does
            gradient.renormalise()


@at_full_precision
def jvp(layer: Layer, *args: Any) -> Tensor:
    """The tangent of a span's output."""
    input, params, tangents, (scale, offset, outputs, start) = JvpArgs.of(args)
    state, tangent = initial_tangent(layer, input, params.first, tangents.first, scale, offset, outputs)
    h, room = state.full(out=torch.empty_like(state.lo)), torch.empty_like(state.lo)
    for j in range(params.layers):
        step_tangent(layer, state, tangent, params.hidden, tangents.hidden, j, h, room, start + j + 1)
    if params.last is None:
        return tangent.state()
    return last_tangent(layer, tangent, tangent.full(out=room), h, params.last.weight, tangents.last)


def initial_tangent(
    layer: Layer,
    input: Tensor,
    first: Affine | None,
    tangents: tuple[Tensor | None, ...],
    scale: float,
    offset: bool,
    outputs: int,
) -> tuple[HiLo, HiLo]:
    """``initial`` and its tangent. ``tangents`` are those of the input, first_weight and first_bias."""
    input_t = tangents[0]
    state = initial(layer, input, first, scale, offset, outputs)
    if first is None:
        return state, entered(torch.zeros_like(input) if input_t is None else input_t, outputs)
    first_t = (None if input_t is None else input_t.movedim(0, -1), *tangents[1:])
    value = state.full(out=torch.empty_like(state.lo))
    return state, first_tangent(layer, input.movedim(0, -1), value, first.weight, outputs, first_t, scale, offset)


def step_tangent(
    layer: Layer,
    state: HiLo,
    tangent: HiLo,
    hidden: tuple[Tensor, Tensor],
    hidden_t: tuple[Tensor | None, Tensor | None],
    j: int,
    h: Tensor,
    room: Tensor,
    after: int,
) -> None:
    """Hidden layer j on a state and its tangent, to state ``after``; ``h`` holds the value of the state before."""
    (weight, bias), (weight_t, bias_t) = hidden, hidden_t
    z = layer.apply(weight[j], tangent.full(out=room), torch.empty_like(h))
    tangent.add_skip(z)
    if weight_t is not None:
        z.add_(layer.apply(weight_t[j], h, room))
    if bias_t is not None:
        z.add_(_column(bias_t[j], z))
    _step(layer, state, weight[j], bias[j], h, room, after)
    tangent.mask(state.full(out=h) <= 0, z)
    if after % RENORMALISE_PERIOD == 0:
        tangent.renormalise()
