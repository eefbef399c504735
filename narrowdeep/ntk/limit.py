"""The neural tangent kernels of infinitely deep narrow networks, in closed form (thesis Theorems 3.1 and 4.1).

Both limits are a scalar kernel k times the identity of size d_out, and both are built from one Gaussian mean,
``E(a, b) = E[relu(g_a) relu(g_b)]`` for g with covariance ``w <a, b> + beta^2``. With ``q_a``, ``q_b`` the variances,
``c`` the covariance, ``s = sqrt(q_a q_b - c^2)`` and ``phi = pi - angle = atan2(s, -c)`` (Cho and Saul 2009, degree 1):

    E = (s + phi c) / (2 pi),    dE/dc = phi / (2 pi),    dE/dq_a = s / (4 pi q_a)

The value is insensitive to s where inputs coincide (E = c/2 + O(s^3)), so it takes s from the Gram matrix alone. The
derivative is not (phi = pi - s/c + ...), so it takes s of nearly parallel pairs from their difference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrowdeep.checks import check_count, check_number
from narrowdeep.ntk.checks import as_samples
from narrowdeep.ntk.modes import check_alike, exact
from narrowdeep.ops.chain import loop_vmap

Samples = Tensor | np.ndarray

CLIPPED: ContextVar[list[str] | None] = ContextVar("CLIPPED", default=None)
"""Where set, the limit kernels append the name of an argument that has negative entries: they act as 0."""

_BLOCK = 1 << 21
"""Entries of one block of the kernel: what bounds temporary memory (a few tens of MB in float64)."""

_PARALLEL = 1e-4
"""Squared sine under which a pair is nearly parallel; above it the Gram matrix gives the angle to 50 ulp."""


def _blocks(rows: int, columns: int) -> Iterator[slice]:
    """Row blocks of about ``_BLOCK`` entries."""
    size = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def _sine_area(a: Tensor, b: Tensor, q_a: Tensor, q_b: Tensor, c: Tensor, w: float, beta2: float) -> Tensor:
    """s for a block of pairs, relatively accurate for nearly parallel ones as well.

    ``q_a q_b - c^2 = w^2 |a|^2 |d_perp|^2 + w beta^2 |d|^2`` with d = b - a and d_perp its part orthogonal to a.
    """
    area = q_a[:, None] * q_b
    s2 = (area - c * c).clamp_min_(0)
    rows, columns = torch.nonzero((s2 < _PARALLEL * area) & (c > 0), as_tuple=True)
    size = max(1, _BLOCK // max(1, a.shape[1]))
    for start in range(0, rows.shape[0], size):
        i, j = rows[start : start + size], columns[start : start + size]
        left, d = a[i], b[j] - a[i]
        norm2 = left.square().sum(1)
        along = (left * d).sum(1) / torch.where(norm2 > 0, norm2, torch.ones_like(norm2))
        perp2 = (d - along[:, None] * left).square().sum(1)
        s2[i, j] = w * (w * norm2 * perp2 + beta2 * d.square().sum(1))
    return s2.sqrt_()


def _exactly(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` in the dtype of its tensors, in a backward that is called under autocast as well."""

    @wraps(forward)
    def exactly(first: Tensor, *rest: Any) -> Any:
        with exact([first.device.type]):
            return forward(first, *rest)

    return exactly


class _ArcCosine(torch.autograd.Function):
    """``out[i, j] = sum_{p, p'} M[p, p'] (dot <a[i, p], b[j, p']> + E(a[i, p], b[j, p']))``, block by block.

    a (N1, Q, D), b (N2, Q, D), M (Q, Q). The backward computes its blocks again, so nothing of size Q^2 N1 N2 (or even
    N1 N2, apart from the result) is kept. Differentiable once.
    """

    @staticmethod
    @_exactly
    def forward(a: Tensor, b: Tensor, weight: Tensor, w: float, beta2: float, dot: float, symmetric: bool) -> Tensor:
        (n1, positions, _), n2 = a.shape, b.shape[0]
        out = a.new_empty(n1, n2)
        q_a = w * a.square().sum(-1) + beta2
        q_b = (w * b.square().sum(-1) + beta2).flatten()
        columns = b.flatten(0, 1)
        for rows in _blocks(n1, n2 * positions**2):
            first = rows.start if symmetric else 0
            gram = a[rows].flatten(0, 1) @ columns[first * positions :].t()
            c = (gram * w).add_(beta2)
            s = q_a[rows].flatten()[:, None] * q_b[first * positions :]
            s.addcmul_(c, c, value=-1).clamp_min_(0).sqrt_()
            e = torch.atan2(s, -c).mul_(c).add_(s).mul_(0.5 / math.pi).add_(gram, alpha=dot)
            if positions > 1:
                e = e.view(rows.stop - rows.start, positions, n2 - first, positions)
                e = torch.einsum("ipjq,pq->ij", e, weight)
            else:
                e.mul_(weight)
            out[rows, first:] = e
            if symmetric:
                square = out[rows, rows]
                square.copy_(square.triu() + square.triu(1).t())
                out[rows.stop :, rows] = out[rows, rows.stop :].t()
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.settings = inputs[3:6]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (*_ArcCosineBackward.apply(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        return loop_vmap(_ArcCosine.apply, info, in_dims, args)


class _ArcCosineBackward(torch.autograd.Function):
    """Gradients of a and b, as a node of its own so that a second derivative raises."""

    @staticmethod
    @_exactly
    def forward(
        grad: Tensor, a: Tensor, b: Tensor, weight: Tensor, w: float, beta2: float, dot: float
    ) -> tuple[Tensor, Tensor]:
        (n1, positions, _), n2 = a.shape, b.shape[0]
        grad_a = torch.empty_like(a)
        q_a = w * a.square().sum(-1) + beta2
        columns = b.flatten(0, 1)
        q_b = w * columns.square().sum(-1) + beta2
        grad_b, grad_q_b = torch.zeros_like(columns), torch.zeros_like(q_b)
        for rows in _blocks(n1, n2 * positions**2):
            left, q = a[rows].flatten(0, 1), q_a[rows].flatten()
            c = (left @ columns.t()).mul_(w).add_(beta2)
            s = _sine_area(left, columns, q, q_b, c, w, beta2)
            g = (grad[rows, None, :, None] * weight[:, None, :]).reshape(c.shape)
            slope = torch.atan2(s, -c).mul_(0.5 * w / math.pi).add_(dot).mul_(g)
            gs = s.mul_(g)
            # d q_a / d a = 2 w a; q_a = 0 means a = 0, a kink of E whose slopes on both sides cancel.
            grad_q = torch.where(q > 0, gs.sum(1) / q, torch.zeros_like(q))
            grad_a[rows] = (slope @ columns + (0.5 * w / math.pi) * grad_q[:, None] * left).view_as(a[rows])
            grad_b += slope.t() @ left
            grad_q_b += gs.sum(0)
        grad_q_b = torch.where(q_b > 0, grad_q_b / q_b, torch.zeros_like(q_b))
        grad_b += (0.5 * w / math.pi) * grad_q_b[:, None] * columns
        return grad_a, grad_b.view_as(b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(
            "the limit kernels are differentiable once: their second derivative is infinite at coinciding inputs"
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
        return loop_vmap(_ArcCosineBackward.apply, info, in_dims, args)


def _pair(x1: Samples, x2: Samples | None, shape: str) -> tuple[Tensor, Tensor | None]:
    """Both sets of samples as tensors, checked."""
    dims = shape.count(",") + 1
    tensors = [as_samples(name, x) for name, x in (("x1", x1), ("x2", x2)) if name == "x1" or x is not None]
    for name, x in zip(("x1", "x2"), tensors, strict=False):
        if x.dim() != dims:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(x.shape)}")
        if 0 in x.shape[1:]:
            raise ValueError(f"{name} must have at least one feature a sample, got shape {tuple(x.shape)}")
    if (seen := CLIPPED.get()) is not None:
        seen += [name for name, x in zip(("x1", "x2"), tensors, strict=False) if (x < 0).any()]
    if len(tensors) == 1:
        return tensors[0], None
    left, right = tensors
    if left.shape[1:] != right.shape[1:]:
        raise ValueError(
            "x1 and x2 must have the same shape after the first dimension, "
            f"got {tuple(left.shape)} and {tuple(right.shape)}"
        )
    check_alike("x1", left, "x2", right)
    return left, right


def limit_ntk_mlp(
    x1: Samples, x2: Samples | None = None, *, rho: float = 1.0, beta: float = 1.0, out_features: int = 1
) -> Tensor:
    """Scaled NTK of a DeepNarrowMLP as its depth goes to infinity (thesis Theorem 3.1, for any output size).

    The matrix kernel is ``k(x, x') I`` with ``k = <x, x'> + out_features + E``, E the mean of relu(g) relu(g') for g
    with covariance ``rho^2 / in <x, x'> + beta^2``. (The theorem prints 1 where out_features belongs.) The thesis
    takes positive inputs; a negative entry acts as 0, because the first ReLU removes it from every later layer.

    Arguments:
        x1, x2: (N1, in) and (N2, in), tensors or NumPy arrays, float32 or float64; ``x2=None`` stands for x1 and takes
            half the work.
        rho, beta: standard deviations of the initialisation.
        out_features: outputs of the network.

    Returns: a tensor (N1, N2), dtype and device of x1. Differentiable once with respect to x1 and x2, with finite
    gradients at coinciding inputs too. Beside the result, memory does not grow with N1 N2.

    Raises: TypeError or ValueError naming the argument, the rule and the value.

    Examples:
        >>> import torch
        >>> from narrowdeep.ntk import limit_ntk_mlp
        >>> limit_ntk_mlp(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[2.7500, 1.5441],
                [1.5441, 2.7500]])
    """
    left, right = _pair(x1, x2, "(N, in)")
    rho, beta = check_number("rho", rho), check_number("beta", beta)
    out_features = check_count("out_features", out_features, 1)
    a = left.relu()[:, None]
    b = a if right is None else right.relu()[:, None]
    one = a.new_ones(1, 1)
    return _ArcCosine.apply(a, b, one, rho**2 / left.shape[1], beta**2, 1.0, right is None).add_(out_features)


def tap_overlap(size: int, kernel_size: int) -> Tensor:
    """(size, size) float64: filter taps whose shift keeps both positions of a line inside it."""
    positions = torch.arange(size, device="cpu")
    taps = torch.arange(kernel_size, device="cpu") - kernel_size // 2
    moved = positions[:, None] + taps
    inside = ((moved >= 0) & (moved < size)).double()
    return inside @ inside.t()


def limit_ntk_cnn(
    x1: Samples,
    x2: Samples | None = None,
    *,
    rho: float = 1.0,
    beta: float = 1.0,
    kernel_size: int = 3,
    out_channels: int = 1,
) -> Tensor:
    """Scaled NTK of a DeepNarrowCNN as its depth goes to infinity (thesis Theorem 4.1, corrected and generalised).

    The matrix kernel is ``k(x, x') I`` with, over pairs of positions p, p',

        k = (H W)^-2 sum_{p, p'} M(p, p') [ sum_c x_cp x'_cp' + out_channels + E(patch_p x, patch_p' x') ]

    M the number of filter taps whose shift keeps both positions inside the image, and E the mean of relu(g) relu(g')
    for g with covariance ``rho^2 <patch, patch'> + beta^2`` on zero-padded patches. Negative entries act as 0 (see
    ``limit_ntk_mlp``).

    Arguments:
        x1, x2: (N1, C, H, W) and (N2, C, H, W), tensors or NumPy arrays, float32 or float64; ``x2=None`` stands for x1,
            half the work.
        rho, beta: standard deviations of the initialisation.
        kernel_size: odd.
        out_channels: outputs of the network.

    Returns: a tensor (N1, N2), dtype and device of x1; differentiable once. Time grows as N1 N2 (H W)^2.

    Raises: TypeError or ValueError naming the argument, the rule and the value.

    Examples:
        >>> import torch
        >>> from narrowdeep.ntk import limit_ntk_cnn
        >>> limit_ntk_cnn(torch.rand(3, 1, 8, 8), torch.rand(2, 1, 8, 8)).shape
        torch.Size([3, 2])
    """
    left, right = _pair(x1, x2, "(N, C, H, W)")
    rho, beta = check_number("rho", rho), check_number("beta", beta)
    kernel_size, out_channels = check_count("kernel_size", kernel_size, 1), check_count("out_channels", out_channels, 1)
    if kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, got {kernel_size}")
    height, width = left.shape[2:]
    with exact([left.device.type]):
        rows = tap_overlap(height, kernel_size).to(left)
        columns = tap_overlap(width, kernel_size).to(left)
        pairs = torch.kron(rows, columns)
        patches = [
            torch.nn.functional.unfold(x.relu(), kernel_size, padding=kernel_size // 2).transpose(1, 2)
            for x in ((left,) if right is None else (left, right))
        ]
        mean = _ArcCosine.apply(patches[0], patches[-1], pairs, rho**2, beta**2, 0.0, right is None)
        a = left.relu()
        b = a if right is None else right.relu()
        linear = (rows @ a @ columns).flatten(1) @ b.flatten(1).t()
        if right is None:
            linear = (linear + linear.t()) / 2
        return (mean + linear + out_channels * pairs.sum()) / (height * width) ** 2
