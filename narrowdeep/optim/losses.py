"""What a Gauss-Newton step minimises, as a function of the outputs: squares of a residual, or what a closure computes.

Where a model is linear in its parameters, coefficients a move its outputs by K a. Either loss says which ones minimise
``loss(f + K a) + lambda/2 a.K a``, and what it is then.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from narrowdeep.checks import shown
from narrowdeep.optim.systems import System

_NEWTON = 50
"""Iterations in function space at most; 5 to 10 are usual for cross-entropy."""

_CONJUGATE = 500
"""Of conjugate gradients in each, at most."""

_TOLERANCE = 1e-5
"""Decrease of an iteration after which there is none, relative to the loss before the step."""

_INEXACT = 0.1
"""What conjugate gradients may leave of a system: the next iteration of Newton's method takes it up."""


class Loss(Protocol):
    def value(self, outputs: Tensor) -> float:
        """At outputs (N, out), float64."""

    def solve(self, outputs: Tensor, system: System, damping: float) -> tuple[Tensor, Tensor]:
        """Coefficients a (N, out) from these outputs f on, and ``f + K a``.

        Raises: numpy.linalg.LinAlgError as the system's.
        """


class SquaredLoss:
    """``1/(2N) sum ||f - y||^2``: one linear system."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def value(self, outputs: Tensor) -> float:
        residual = self.targets - outputs
        return float(residual.square().sum()) / (2 * len(residual))

    def solve(self, outputs: Tensor, system: System, damping: float) -> tuple[Tensor, Tensor]:
        coefficients = system.solve(self.targets - outputs, damping)
        left = damping * system.mean * coefficients
        return coefficients, self.targets - left


class ClosureLoss:
    """The loss that a closure computes from the outputs of ``model(x)``, which it calls once.

    The model does not run: its ``forward`` gives the closure outputs that are known, or those to be tried.
    """

    def __init__(self, model: nn.Module, closure: Callable[[], Any]) -> None:
        """Raises: ValueError for a closure that does not call the model with one tensor."""
        self._model, self._closure = model, closure
        self.x = self._samples()
        self._shape: tuple[int, ...] | None = None
        self._dtype = self.x.dtype

    def like(self, outputs: Tensor) -> None:
        """Outputs of the model: what the closure is given has their shape and dtype."""
        self._shape, self._dtype = outputs.shape, outputs.dtype

    def _run(self, forward: Callable[..., Any]) -> Any:
        attributes = vars(self._model)
        kept = attributes.get("forward")
        attributes["forward"] = forward
        try:
            with torch.enable_grad():
                return self._closure()
        finally:
            del attributes["forward"]
            if kept is not None:
                attributes["forward"] = kept

    def _samples(self) -> Tensor:
        def forward(*args: Any, **kwargs: Any) -> Any:
            raise _Called(args, kwargs)

        try:
            self._run(forward)
        except _Called as called:
            if len(called.inputs) == 1 and isinstance(called.inputs[0], Tensor) and not called.keywords:
                return called.inputs[0]
            raise ValueError("closure must call the model with one tensor, its samples") from None
        raise ValueError("closure must call the model, whose loss it computes")

    def _loss(self, outputs: Tensor) -> Tensor:
        """Of the model's own shape and dtype."""
        calls = 0

        def forward(*_: Any, **__: Any) -> Tensor:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise ValueError("closure must call the model once, with all samples of the step")
            return outputs.clone()

        found = self._run(forward)
        if outputs.grad is not None:
            raise ValueError("closure must not call backward, which the step does: return the loss alone")
        if not isinstance(found, Tensor) or found.numel() != 1:
            got = tuple(found.shape) if isinstance(found, Tensor) else shown(found)
            raise ValueError(f"closure must return the loss, a scalar tensor, got {got}")
        return found.reshape(())

    def _given(self, outputs: Tensor) -> Tensor:
        """A leaf, so that a closure that calls backward is found out."""
        given = outputs.detach().to(self._dtype, copy=True)
        return given.reshape(outputs.shape if self._shape is None else self._shape).requires_grad_()

    def value(self, outputs: Tensor) -> float:
        return float(self._loss(self._given(outputs)).detach())

    def expand(self, outputs: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The gradient (N, out), and the Hessian as a function of such tensors; float64."""
        given = self._given(outputs)
        loss = self._loss(given)
        if not loss.requires_grad:
            raise ValueError("closure must return a loss of the model's outputs, got one without a gradient")
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(loss, given, create_graph=True)

        def curvature(v: Tensor) -> Tensor:
            if not gradient.requires_grad:
                return torch.zeros_like(v)
            (found,) = torch.autograd.grad(gradient, given, v.to(gradient).reshape(gradient.shape), retain_graph=True)
            return found.double().reshape(v.shape)

        return gradient.detach().double().reshape(outputs.shape), curvature

    def solve(self, outputs: Tensor, system: System, damping: float) -> tuple[Tensor, Tensor]:
        """By Newton's method in function space: every system is that of the Gauss-Newton matrix at some outputs.

        lambda is ``damping`` times the mean of K's diagonal and the curvature along the first gradient: for squares,
        whatever their factor, that is what it is in ``SquaredLoss``.
        """
        first = before = self.value(outputs)
        gradient, curvature = self.expand(outputs)
        size = float(gradient.square().sum())
        coefficients, now = torch.zeros_like(outputs), outputs
        if size == 0:
            return coefficients, now
        slope = float((gradient * curvature(gradient)).sum()) / size
        if not (slope > 0 and math.isfinite(slope)):
            raise ValueError(f"closure must be convex in the model's outputs, got the curvature {slope:g}")
        ridge = damping * system.mean * slope
        for _ in range(_NEWTON):
            right = -gradient - ridge * coefficients
            change, moved = _conjugate(curvature, ridge, right, system, damping, slope)
            decrease, share = float((right * moved).sum()), 1.0
            while True:  # as far as the loss falls as it should
                there, then = coefficients + share * change, now + share * moved
                after = self.value(then) + ridge / 2 * float((there * (then - outputs)).sum())
                if after <= before - 1e-4 * share * decrease or share < 1e-3:
                    break
                share /= 2
            if not after < before:
                break
            coefficients, now, before = there, then, after
            if decrease <= _TOLERANCE * abs(first):
                break
            gradient, curvature = self.expand(now)
        return coefficients, now


class _Called(Exception):  # noqa: N818 (says what a closure calls the model with, and is no error)
    def __init__(self, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        super().__init__()
        self.inputs, self.keywords = inputs, keywords


def _conjugate(
    curvature: Callable[[Tensor], Tensor], ridge: float, right: Tensor, system: System, damping: float, slope: float
) -> tuple[Tensor, Tensor]:
    """a and K a of ``(H K + ridge) a = right``, by conjugate gradients.

    ``H K`` is symmetric in the inner product ``u.K v``. ``(slope K + ridge)^-1``, which the system solves and which is
    the inverse where H is a multiple of the identity, makes them converge in few iterations.
    """
    found, moved = torch.zeros_like(right), torch.zeros_like(right)
    residual = right.clone()
    direction, mapped, before = found, moved, 0.0
    limit = math.inf
    for i in range(_CONJUGATE):
        near = system.solve(residual, damping) / slope
        seen = system.product(near)
        now = float((residual * seen).sum())
        limit = _INEXACT**2 * now if i == 0 else limit
        if not now > limit:
            break
        share = now / before if i else 0.0
        direction, mapped, before = near + share * direction, seen + share * mapped, now
        applied = curvature(mapped) + ridge * direction
        length = float((mapped * applied).sum())
        if not length > 0:
            raise ValueError(f"closure must be convex in the model's outputs, got the curvature {length:g}")
        found, moved = found + now / length * direction, moved + now / length * mapped
        residual = residual - now / length * applied
    return found, moved
