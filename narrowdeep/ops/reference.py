"""A span of a deep narrow chain in plain torch, forward only: the definition of truth for every other version.

Gradients and tangents of truth are those of autograd and ``torch.func.jvp`` through ``forward`` in float64.

One legend of symbols, for Python, C++ (``csrc/``) and Triton (``docs/theory.md`` derives them):

=================  =======================================================================================
``L, n, B``        affine layers, hidden width (channels), batch size
``h``              value of a hidden state, ``h = (base + hi) + lo``, in three words
``base``           of a state: ``[scale relu(x); 0; scale 1]`` in offset form, 0 in plain form
``hi``             what has been moved out of ``lo`` so far, every ``RENORMALISE_PERIOD`` layers, by an exact two-sum
``lo``             the rest
``G``              gradient with respect to a pre-activation, in three words as well: ``base`` is R = ``[0; 0; r]``
``T``              tangent of a state, alike: ``base`` is D = ``[scale relu'(x) x_t; 0; 0]``
``skip``           diagonal of the identity part E of a hidden weight: ``[1..1, 0, 1..1]``, or 0 in plain form
``checkpoints``    states saved for the backward, one every ``segment`` layers
``start``          number of a span's first state
=================  =======================================================================================

A state is a tensor (n, *positions, B): no positions for the MLP, (H, W) for the convolution chain, whose output is the
mean over positions. States are numbered from 0: state 0 is the output of the first layer's ReLU, hidden layer ``j``
takes state ``j`` to state ``j + 1``. Where a state is renormalised depends on its number alone, so a result depends
neither on the checkpoints nor on where a chain is cut.

Between spans goes a state as one tensor, ``(base, hi, lo)`` of shape (3, n, *positions, B) in offset form, ``h`` of
shape (1, n, *positions, B) in plain form. Its gradient and its tangent have the same shape: of G, after the mask of the
state's ReLU and its renormalisation, and of T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from narrowdeep.ops.params import Affine, ForwardArgs

RENORMALISE_PERIOD = 32
"""Layers between two exact moves of ``lo`` into ``hi`` (2.6e-8 off at L = 10000; more often gains nothing)."""

LinearMap = Callable[[Tensor, Tensor], Tensor]
"""The linear map of one layer without its bias, (weight, h) -> z. States have the batch last."""


def saved_shape(
    layers: int, state: tuple[int, ...], offset: bool, segment: int, first: bool = True, last: bool = True
) -> tuple[int, ...]:
    """Shape of what the forward of a span of hidden layers saves; ``state`` is (n, *positions, B).

    ``segment`` 0: nothing, ``(0, 1, *state)``. 1: h of every state, ``(layers + 1, 1, *state)``. k >= 2: states 0, k,
    ... as ``(hi, lo)`` in offset form, h in plain form, ``(ceil(layers / k) or 1, 2 or 1, *state)``. A state that comes
    in (not ``first``) is not saved again, nor, with k = 1, one that goes out (not ``last``).
    """
    if segment == 0:
        return (0, 1, *state)
    if segment == 1:
        return (max(0, layers + 1 - (not first) - (not last)), 1, *state)
    return (max(1, -(-layers // segment)) - (not first), 2 if offset else 1, *state)


def two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Knuth's exact sum: ``s = fl(a + b)`` and ``e`` with ``s + e == a + b`` exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def renormalise(base: Tensor, hi: Tensor, lo: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
    """Move ``lo`` into ``hi`` where ``skip``; a unit that stands at exactly 0 stays there.

    What the sum rounds off stays in ``lo``. It is a constant to autograd: the derivative of an exact sum is all in hi.
    """
    total, rest = hi + lo, two_sum(hi.detach(), lo.detach())[1]
    dead = (base + hi) + lo == 0
    total = torch.where(dead, -base, total)
    rest = torch.where(dead, torch.zeros_like(rest), rest)
    return torch.where(skip, total, hi), torch.where(skip, rest, lo)


def column(bias: Tensor, like: Tensor) -> Tensor:
    """A bias (n,) as (n, 1, ..., 1), to be added to states."""
    return bias.reshape(-1, *(1 for _ in like.shape[1:]))


def skip_mask(like: Tensor, outputs: int, offset: bool) -> Tensor:
    """``skip``, (n, 1, ..., 1), of states of the shape of ``like``."""
    width = like.shape[0]
    return column((torch.arange(width, device=like.device) != width - outputs - 1) & offset, like)


def skipped(skip: Tensor, lo: Tensor) -> Tensor:
    """E lo."""
    return torch.where(skip, lo, torch.zeros_like(lo))


def _pool(z: Tensor) -> Tensor:
    """The mean over positions, (out, *positions, B) -> (B, out)."""
    positions = math.prod(z.shape[1:-1])
    return (z.reshape(z.shape[0], positions, z.shape[-1]).sum(1) / positions).t().contiguous()


def _clip(z: Tensor, floor: Tensor) -> Tensor:
    """max(z, floor) that keeps a NaN in z (as ``torch.relu`` does), with derivative 0 at the floor."""
    return torch.where(floor >= z, floor, z)


def behind_relu(h: Tensor, grad: Tensor, floor: Tensor) -> Tensor:
    """The gradient before a ReLU whose output is ``h``: ``grad`` where it is on, else ``floor``, minus the rest of the
    gradient's words, so that the whole is exactly 0."""
    return torch.where(h <= 0, floor, grad)


def base_and_rest(x: Tensor, width: int, outputs: int, scale: float, offset: bool) -> tuple[Tensor, Tensor]:
    """``base`` of every state, and what it leaves of ``E_1 x``; ``x`` is (in, *positions, B)."""
    base = rest = x.new_zeros(width, *x.shape[1:])
    if offset:
        left, zero = scale * x, torch.zeros_like(x)
        middle, right = base[: width - outputs - x.shape[0]], base[:outputs]
        # relu'(0) = 0; a NaN stays in both
        base = torch.cat((torch.where(left <= 0, zero, left), middle, right + scale))
        rest = torch.cat((torch.where(left > 0, zero, left), middle, right))
    return base, rest


def initial(
    affine: LinearMap, input: Tensor, first: Affine | None, outputs: int, scale: float, offset: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``(base, hi, lo)`` before the first hidden layer: what the first layer makes of x, or the state that is given."""
    if first is None:
        zero = torch.zeros_like(input[0])
        return (input[0], input[1], input[2]) if offset else (zero, zero, input[0])
    x = input.movedim(0, -1)
    base, rest = base_and_rest(x, first.weight.shape[0], outputs, scale, offset)
    lo = rest + (affine(first.weight, x) + column(first.bias, x))
    return base, torch.zeros_like(base), _clip(lo, -base)


def step(affine: LinearMap, skip: Tensor, base: Tensor, hi: Tensor, lo: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``lo`` behind a hidden layer, before it is renormalised."""
    h = (base + hi) + lo
    return _clip(skipped(skip, lo) + (affine(weight, h) + column(bias, h)), -(base + hi))


def states(
    affine: LinearMap,
    base: Tensor,
    hi: Tensor,
    lo: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    outputs: int,
    offset: bool,
    start: int = 0,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield ``(number, hi, lo)`` of state ``start``, which is given, and of those after each of the hidden layers."""
    skip = skip_mask(lo, outputs, offset)
    yield start, hi, lo
    for number, (weight, bias) in enumerate(zip(hidden_weight, hidden_bias, strict=True), start + 1):
        lo = step(affine, skip, base, hi, lo, weight, bias)
        if offset and number % RENORMALISE_PERIOD == 0:
            hi, lo = renormalise(base, hi, lo, skip)
        yield number, hi, lo


def final(
    affine: LinearMap, base: Tensor, hi: Tensor, lo: Tensor, last: Affine | None, outputs: int, offset: bool
) -> Tensor:
    """What a span gives: the last layer's output, or the state."""
    if last is None:
        return torch.stack((base, hi, lo)) if offset else lo.unsqueeze(0)
    h = (base + hi) + lo
    z = affine(last.weight, h) + column(last.bias, h)
    if offset:
        z = (hi + lo)[h.shape[0] - outputs :] + z
    return _pool(z)


def forward(affine: LinearMap, *args: Any) -> tuple[Tensor, Tensor]:
    """(output, saved) of a span; arguments and results as ``narrowdeep.ops.chain`` has them. Differentiable."""
    input, params, (scale, offset, outputs, start), segment = ForwardArgs.of(args)
    first, hidden, last = params
    base, hi, lo = initial(affine, input, first, outputs, scale, offset)
    ends = first is not None, last is not None
    saved = lo.new_empty(saved_shape(params.layers, tuple(lo.shape), offset, segment, *ends))
    for number, hi, lo in states(affine, base, hi, lo, *hidden, outputs, offset, start):  # noqa: B020
        row, between = divmod(number - start, segment) if segment else (0, 1)
        row -= first is None
        if between == 0 and 0 <= row < saved.shape[0]:
            parts = torch.stack((hi, lo)) if offset and segment > 1 else (base + hi) + lo
            saved[row] = parts.detach()
    return final(affine, base, hi, lo, last, outputs, offset), saved
