"""The empirical tangent kernel of a chain in plain torch: the definition of truth for the gram ops.

With ``h`` the input of affine layer l and ``B_l = df/dz_l``, the Jacobians of the layer's weight and bias are the outer
product of B_l and h and B_l itself, so that a layer adds ``(<h, h'> + 1) <B_l_a, B_l'_b>`` to Theta_ab (for a
convolution: the product of the gradients of its filters, which are small). Layers are taken one at a time from the last
to the first, and the sum over them is float64. The symbols are those of ``narrowdeep.ops.reference``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowdeep.ops.cnn.reference import convolution, patches
from narrowdeep.ops.mlp.reference import linear
from narrowdeep.ops.params import Affine
from narrowdeep.ops.reference import (
    RENORMALISE_PERIOD,
    LinearMap,
    behind_relu,
    initial,
    renormalise,
    skip_mask,
    skipped,
    states,
)

Factors = tuple[int, Tensor, Tensor]
"""(l, h, B): layer 1 .. L, its input (m, *positions, N), and df/dz_l, (n, *positions, out, N)."""

FULL, TRACE, DIAGONAL = range(3)
"""``reduce``: (N1, N2, out, out); its trace over outputs, (N1, N2); its diagonal over outputs, (N1, N2, out)."""

ALL_TRAINABLE = 0b111111
"""``trainable``: bit i stands for the i-th of the six stacked parameters; a frozen one is left out of the kernel."""


def layer_factors(
    family: Family, x: Tensor, params: tuple[Tensor, ...], scale: float, offset: bool
) -> Iterator[Factors]:
    """The factors of every layer, from the last to the first; ``x`` is (N, in, *positions).

    B is carried in offset form as in the chain's backward, for the output gradients r = e_a of all outputs at once.
    """
    first_weight, first_bias, hidden_weight, hidden_bias, last_weight, _ = params
    outputs, width = last_weight.shape[:2]
    base, hi, lo = initial(family.affine, x, Affine(first_weight, first_bias), outputs, scale, offset)
    hidden = hidden_weight, hidden_bias
    values = [(base + h_hi) + h_lo for _, h_hi, h_lo in states(family.affine, base, hi, lo, *hidden, outputs, offset)]
    samples, positions = x.shape[0], x.shape[2:]

    def split(b: Tensor) -> Tensor:
        return b.unflatten(-1, (outputs, samples))

    def repeated(h: Tensor) -> Tensor:
        return h.unsqueeze(-2).expand(*h.shape[:-1], outputs, samples).flatten(-2)

    # (out, *positions, out N): every position has the same share in the mean.
    r = torch.eye(outputs, dtype=x.dtype, device=x.device) / math.prod(positions)
    r = r.reshape(outputs, *(1 for _ in positions), outputs, 1)
    r = r.expand(outputs, *positions, outputs, samples).flatten(-2)
    base = x.new_zeros(width, *r.shape[1:])  # of the gradient, from here on
    if offset:
        base[width - outputs :] = r
    skip = skip_mask(base, outputs, offset)
    hi, h = torch.zeros_like(base), values[-1]
    yield len(values) + 1, h, split(r)
    lo = behind_relu(repeated(h), family.transpose(last_weight, r), -base)
    for j in range(len(values) - 2, -1, -1):  # here B is the gradient of state j + 1, with respect to z of layer j + 2
        full, h = (base + hi) + lo, values[j]
        yield j + 2, h, split(full)
        grad = skipped(skip, lo) + family.transpose(hidden_weight[j], full)
        lo = behind_relu(repeated(h), grad, -(base + hi))
        if offset and j > 0 and j % RENORMALISE_PERIOD == 0:
            hi, lo = renormalise(base, hi, lo, skip)
    yield 1, x.movedim(0, -1), split((base + hi) + lo)


def _linear_transpose(weight: Tensor, g: Tensor) -> Tensor:
    return weight.t() @ g


def _conv_transpose(weight: Tensor, g: Tensor) -> Tensor:
    return convolution(weight.flip(2, 3).transpose(0, 1), g)


def _linear_weight_jacobian(b: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nai,mi->ianm", b, h)


def _conv_weight_jacobian(b: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("nyxai,mrsyxi->ianmrs", b, patches(h, weight.shape[-1]))


def bias_jacobian(b: Tensor) -> Tensor:
    """(n, *positions, out, N) -> (N, out, n)."""
    return b.reshape(b.shape[0], -1, *b.shape[-2:]).sum(1).permute(2, 1, 0)


def _linear_layer_gram(left: Factors, right: Factors, weight: Tensor, has_weight: bool, has_bias: bool) -> Tensor:
    (_, h1, b1), (_, h2, b2) = left, right
    inner = float(has_bias) + float(has_weight) * (h1.double().t() @ h2.double())
    return inner[:, :, None, None] * torch.einsum("nai,nbj->ijab", b1.double(), b2.double())


def _conv_layer_gram(left: Factors, right: Factors, weight: Tensor, has_weight: bool, has_bias: bool) -> Tensor:
    (_, h1, b1), (_, h2, b2) = left, right
    jacobians = []
    for h, b in ((h1.double(), b1.double()), (h2.double(), b2.double())):
        parts = []
        if has_weight:
            parts.append(_conv_weight_jacobian(b, h, weight).flatten(2))
        if has_bias:
            parts.append(bias_jacobian(b))
        jacobians.append(torch.cat(parts, -1))
    return torch.einsum("iap,jbp->ijab", *jacobians)


@dataclass(frozen=True)
class Family:
    """What the kernels of the two kinds of chain differ in."""

    affine: LinearMap
    transpose: LinearMap
    """(weight, gradient of z) -> gradient of h"""
    weight_jacobian: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(B, h, weight) -> (N, out, *weight.shape), of which only the filter size is read"""
    layer_gram: Callable[[Factors, Factors, Tensor, bool, bool], Tensor]
    """(factors of x1, factors of x2, weight, whether it is trained, whether the bias is) -> (N1, N2, out, out)"""


MLP = Family(linear, _linear_transpose, _linear_weight_jacobian, _linear_layer_gram)
CNN = Family(convolution, _conv_transpose, _conv_weight_jacobian, _conv_layer_gram)


def layer_grams(
    family: Family,
    x1: Tensor,
    x2: Tensor,
    params: tuple[Tensor, ...],
    scale: float,
    offset: bool,
    symmetric: bool,
    trained: Sequence[tuple[bool, bool]],
) -> Iterator[tuple[int, Tensor]]:
    """(l, its part of the kernel (N1, N2, out, out) in float64) from the last layer to the first.

    ``trained`` says for each layer, from the first, whether its weight and its bias are; layers with nothing trained
    are left out.
    """
    depth = params[2].shape[0] + 2
    right_factors = iter(()) if symmetric else layer_factors(family, x2, params, scale, offset)
    for left in layer_factors(family, x1, params, scale, offset):
        right = left if symmetric else next(right_factors)
        which = {1: 0, depth: 4}.get(left[0], 2)
        has_weight, has_bias = trained[left[0] - 1]
        if has_weight or has_bias:
            yield left[0], family.layer_gram(left, right, params[which], has_weight, has_bias)


def reduced(kernel: Tensor, reduce: int) -> Tensor:
    """(..., out, out) -> what ``reduce`` keeps of it."""
    if reduce == FULL:
        return kernel
    diagonal = kernel.diagonal(dim1=-2, dim2=-1)
    return diagonal.sum(-1) if reduce == TRACE else diagonal


def gram(
    family: Family,
    x1: Tensor,
    x2: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    hidden_weight: Tensor,
    hidden_bias: Tensor,
    last_weight: Tensor,
    last_bias: Tensor,
    scale: float,
    offset: bool,
    symmetric: bool,
    trainable: int,
    reduce: int,
) -> Tensor:
    """Theta(x1, x2), float64, unscaled; ``symmetric`` says that x2 is x1. Shapes: see ``FULL``."""
    params = (first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias)
    outputs = last_weight.shape[0]
    total = x1.new_zeros(
        reduced(x1.new_empty(x1.shape[0], x2.shape[0], outputs, outputs), reduce).shape, dtype=torch.float64
    )
    if x1.shape[0] == 0 or x2.shape[0] == 0:
        return total
    first, hidden, last = ((bool(trainable >> i & 1), bool(trainable >> (i + 1) & 1)) for i in (0, 2, 4))
    trained = [first, *[hidden] * hidden_weight.shape[0], last]
    for _, part in layer_grams(family, x1, x2, params, scale, offset, symmetric, trained):
        total += reduced(part, reduce)
    if symmetric:  # what rounding has left of the difference
        mirrored = total.transpose(0, 1)
        total = (total + (mirrored.transpose(2, 3) if reduce == FULL else mirrored)) / 2
    return total
