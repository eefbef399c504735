"""Curvature of a loss in the parameters of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from narrowdeep.checks import check_count, check_number
from narrowdeep.extras import optional
from narrowdeep.functional import check_tensor
from narrowdeep.ntk.empirical import checked_samples
from narrowdeep.ntk.network import check_module, find, function_of, reading

with optional():
    import scipy.sparse.linalg  # type: ignore[import-untyped]

Loss = Callable[[Tensor, Tensor], Tensor]


def _half_mean_square(outputs: Tensor, y: Tensor) -> Tensor:
    if y.shape != outputs.shape:
        raise ValueError(f"y must have the shape of the outputs, {tuple(outputs.shape)}, got {tuple(y.shape)}")
    return (outputs - y).square().sum() / (2 * len(y))


def sharpness(
    model: nn.Module, x: Tensor, y: Tensor, *, loss: Loss | None = None, k: int = 1, tol: float = 1e-4
) -> Tensor:
    """The largest eigenvalues of the Hessian of a loss in a model's parameters, by Lanczos iterations.

    Descent with a learning rate above 2 over the first of them is unstable (Cohen et al., "Gradient descent on neural
    networks typically occurs at the edge of stability", ICLR 2021). An iteration takes one Hessian-vector product,
    which is exact and costs a few gradients; of all samples at once.

    Arguments:
        model: a narrow model, or any module that maps each sample on its own. Parameters with ``requires_grad=False``
            stay out.
        x, y: (N, ...) as the model takes it, and what ``loss`` compares its outputs with.
        loss: (outputs, y) -> scalar; None: ``1/(2N) sum_n |f(x_n) - y_n|^2``, with y of the shape of the outputs.
        k: eigenvalues, fewer than parameters.
        tol: relative accuracy, not negative; 0 is that of the machine.

    Returns: (k,), float64 on the CPU, the largest first.

    Raises: TypeError or ValueError naming the argument, the rule and the value; scipy's ArpackNoConvergence where ten
        iterations a parameter do not do.

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.ntk import empirical_ntk, sharpness
        >>> model, x, y = DeepNarrowMLP(2, 1, depth=1000), torch.rand(8, 2), torch.rand(8, 1)
        >>> kernel = empirical_ntk(model, x)[..., 0, 0]  # divided by L C_L^2 = 1 / model.ntk_lr
        >>> predicted = torch.linalg.eigvalsh(kernel)[-1] / 8
        >>> round(float(sharpness(model, x, y) * model.ntk_lr / predicted), 2)  # Gauss-Newton
        1.0
    """
    check_module("model", model)
    k, tol = check_count("k", k, 1), check_number("tol", tol)
    check_tensor("y", y)
    ours = find(model)
    with reading(model):
        samples = checked_samples(model, ours, "x", x)
        if y.shape[:1] != samples.shape[:1]:
            raise ValueError(f"x and y must have as many samples, got {len(samples)} and {tuple(y.shape)}")
        function = function_of(model, ours)
        function.outputs(samples)  # which checks them
        leaves = {name: value.requires_grad_() for name, value in function.params.items()}
        count = sum(value.numel() for value in leaves.values())
        if k >= count:
            raise ValueError(f"k must be below the number of trained parameters, {count}, got {k}")
        with torch.enable_grad():
            value = (loss or _half_mean_square)(function(leaves, samples), y)
            if not isinstance(value, Tensor) or value.dim():
                raise TypeError(f"loss must return a scalar tensor, got {value!r}")
            grads = torch.autograd.grad(value, tuple(leaves.values()), create_graph=True, materialize_grads=True)
        if not all(grad.isfinite().all() for grad in grads):
            raise ValueError("loss must have finite gradients, got NaN or infinity")
        values = _largest(grads, tuple(leaves.values()), count, k, tol)
    return torch.from_numpy(np.sort(values)[::-1].copy())


def _largest(grads: tuple[Tensor, ...], leaves: tuple[Tensor, ...], count: int, k: int, tol: float) -> Any:
    moving = [grad for grad in grads if grad.requires_grad]  # others are constants

    def product(vector: Any) -> Any:
        parts = torch.from_numpy(np.ascontiguousarray(vector, dtype=np.float64).reshape(-1))
        directions = [
            part.to(leaf).reshape(leaf.shape)
            for part, leaf, grad in zip(parts.split([t.numel() for t in leaves]), leaves, grads, strict=True)
            if grad.requires_grad
        ]
        found = torch.autograd.grad(moving, leaves, directions, retain_graph=True, materialize_grads=True)
        return torch.cat([t.reshape(-1).to("cpu", torch.float64) for t in found]).numpy()

    operator = scipy.sparse.linalg.LinearOperator((count, count), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(count)
    if not moving:
        return np.zeros(k)
    return scipy.sparse.linalg.eigsh(operator, k, which="LA", tol=tol, v0=start, return_eigenvectors=False)
