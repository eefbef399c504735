"""Gauss-Newton steps in function space, for networks whose tangent kernel hardly moves."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowdeep.checks import check_count, check_number, shown
from narrowdeep.distributed.ranks import ALONE, Ranks
from narrowdeep.functional import check_tensor
from narrowdeep.memory.planning import parse_bytes
from narrowdeep.ntk.empirical import checked_samples
from narrowdeep.ntk.features import InitialFeatures
from narrowdeep.ntk.modes import check_alike, exact
from narrowdeep.ntk.network import check_module, find, function_of, reading
from narrowdeep.optim.fused_sgd import STEPPED
from narrowdeep.optim.kernels import EmpiricalKernel, FeatureKernel, FunctionKernel, Kernel, limit_kernel
from narrowdeep.optim.systems import EPS, System

KernelName = Literal["features", "empirical", "limit"]
_BLOCK = 1 << 24
"""Entries of a parameter that move at a time."""

_LEAST_RAISED = 1e-6
"""What a damping of 0 is raised from."""


@dataclass(frozen=True)
class GaussNewtonStep:
    """What one step has done. Losses are ``1/(2N) sum ||f - y||^2``, all over the samples of the step.

    ``loss`` before it; ``predicted``, by the kernel, and ``measured`` after it; the ``damping`` that it took. Where
    the loss has not fallen, an adaptive step takes the parameters back: ``accepted`` is False, and ``measured`` the
    loss that was rejected. ``fitted`` are the model's outputs at x now, and ``outputs`` those that the kernel predicted
    for the samples ``at``; (N, out), float64.

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.optim import GramGaussNewton
        >>> model, x = DeepNarrowMLP(2, 1, depth=1000), torch.rand(50, 2)
        >>> step = GramGaussNewton(model, kernel="features").step(x, x.prod(1, keepdim=True))
        >>> step.accepted, step.measured < 0.01 * step.loss
        (True, True)
    """

    loss: float
    predicted: float
    measured: float
    damping: float
    accepted: bool
    fitted: Tensor = field(compare=False)
    outputs: Tensor | None = field(compare=False)


class GramGaussNewton:
    """Gauss-Newton by the Gram matrix of the tangents: no learning rate, one backward pass a step.

    Where a model is linear in its parameters, the step

        theta += J^T (K + lambda I)^-1 (y - f) / (L C_L^2),    K = J J^T / (L C_L^2)

    ends at the kernel's own ridge regression of y (Cai et al., "Gram-Gauss-Newton method", 2019; Zhang, Martens and
    Grosse, "Fast convergence of natural gradient descent for overparameterized neural networks", 2019). A step measures
    f, solves the system, sends its solution backward through the network as the gradient of the outputs, and measures
    again. Narrow models are linear in this sense up to about 1/C_L (thesis section 3.2). For other modules there is no
    L C_L^2 in either formula.

    The loss is ``1/(2N) sum ||f - y||^2``. ``.grad`` is None after a step. In float32 the residual is a little above
    the predicted one; the next step takes it up.

    Arguments:
        model: as in ``narrowdeep.ntk.empirical_ntk``; parameters with ``requires_grad=False`` stay as they are.
        damping: lambda over the mean of K's diagonal, finite and not negative.
        adaptive: lower and raise the damping by the measured decrease against the predicted one (Levenberg and
            Marquardt, by the rule of Nielsen, 1999), and take a step back that has not lowered the loss. False: take
            every step, with this damping.
        kernel: "features", the kernel at initialisation, which the model must be at now (``narrowdeep.ntk.features``);
            "empirical", the kernel as it is at each step, from a backward for each output; "limit", that of infinite
            depth; or ``kernel(x1, x2)``, (N1, N2) for every output or (N1, N2, out, out), called at every step.
        batch_size: samples of one forward or backward.
        budget: bytes that a matrix and its factor may take, as an int or text ("4GiB"). Smaller systems go by Cholesky,
            in features where they are fewer than the samples; larger ones by conjugate gradients.
        ranks: processes that share the work of a step (``narrowdeep.distributed.Ranks.of()``), all with the same model
            and the same x and y: each takes its part of the samples through the network and, where the system is one in
            features, into that. All take the same step.

    Raises: TypeError or ValueError naming the argument, the rule and the value.

    Examples:
        >>> import torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.optim import GramGaussNewton
        >>> model, x = DeepNarrowMLP(2, 1, depth=1000), torch.rand(50, 2)
        >>> optimizer = GramGaussNewton(model, kernel="features", damping=1e-6)
        >>> step = optimizer.step(x, x.prod(1, keepdim=True))
        >>> bool((model(x) - x.prod(1, keepdim=True)).abs().max() < 0.05)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: float = 1e-4,
        adaptive: bool = True,
        kernel: KernelName | Callable[[Tensor, Tensor], Any] = "empirical",
        batch_size: int = 1024,
        budget: int | str = "4GiB",
        ranks: Ranks = ALONE,
    ) -> None:
        check_module("model", model)
        self.damping = check_number("damping", damping)
        self.batch_size = check_count("batch_size", batch_size, 1)
        self._budget = parse_bytes(budget)
        if not isinstance(adaptive, bool):
            raise TypeError(f"adaptive must be True or False, got {shown(adaptive)}")
        if not callable(kernel) and kernel not in ("features", "empirical", "limit"):
            raise ValueError(f"kernel must be 'features', 'empirical', 'limit' or a callable, got {shown(kernel)}")
        self.model, self.adaptive, self.kernel, self.ranks = model, adaptive, kernel, ranks
        self._ours = find(model)
        self._rate = 1.0 if self._ours is None else self._ours.model.ntk_lr
        self._params = [param for param in model.parameters() if param.requires_grad]
        if not self._params:
            raise ValueError("model must have a parameter that requires gradients, got none")
        if any(id(param) in STEPPED for param in self._params):
            raise ValueError("model must not have parameters of a FusedSGD: call remove() on that one first")
        self._kernel = self._make_kernel()
        self._growth = 2.0
        self._warned = False
        self._solved: tuple[Tensor, int, System] | None = None

    def _make_kernel(self) -> Kernel:
        if callable(self.kernel):
            return FunctionKernel(self.kernel, constant=False)
        if self.kernel == "features":
            return FeatureKernel(InitialFeatures.of(self.model, self._ours), self.ranks)
        if self.kernel == "empirical":
            return EmpiricalKernel(self.model)
        if self._ours is None or self._ours.family is None:
            raise ValueError(f"model must be a narrow model for kernel='limit', got {type(self.model).__name__}")
        if len(self._params) < len(list(self.model.parameters())):
            raise ValueError("model must have no frozen parameters for kernel='limit', which counts all of them")
        return limit_kernel(self._ours)

    def step(
        self, x: Tensor, y: Tensor, *, at: Tensor | None = None, on_batch: Callable[[int, int], None] | None = None
    ) -> GaussNewtonStep:
        """One step on the samples x with targets y.

        Arguments:
            x: (N, ...), as the model takes it; the same tensor at every step keeps a constant kernel's system.
            y: of the shape, dtype and device of ``model(x)``; above -C_L for a narrow model, whose right units stop
                there.
            at: other samples, whose outputs after the step the kernel predicts.
            on_batch: called with (samples done, samples in all) after each forward and backward, of all ranks about.

        Raises: TypeError or ValueError naming the argument, the rule and the value, before any kernel runs;
            numpy.linalg.LinAlgError, with the smallest damping that works, for a system that is singular.
        """
        samples, others, targets = self._checked(x, y, at)
        done, total, share = 0, 3 * len(x), self.ranks.share(len(x))
        own = 3 * (share.stop - share.start)

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if on_batch is not None:
                on_batch(total * done // own if own else total, total)

        with exact({param.device.type for param in self._params}):
            fitted = self._outputs(x, advance)
            residual = targets - fitted
            if not residual.isfinite().all():
                raise ValueError("model must have finite outputs at x, got NaN or infinity")
            loss, damping = _loss(residual), self.damping
            system = self._system(x, samples, residual.shape[1])
            solution = system.solve(residual, damping)
            coefficients = self.ranks.rows(len(x), lambda rows: solution[rows])  # the same bits everywhere
            outputs = None
            if at is not None and others is not None:
                outputs = self._outputs(at, lambda _: None)
                outputs += self.ranks.rows(
                    len(at), lambda rows: self._kernel.product(others[rows], samples, coefficients)
                )
            try:
                self._backward(x, coefficients, advance)
                self._move()
                after = self._outputs(x, advance)
                measured = _loss(targets - after)
                accepted = not self.adaptive or measured < loss
                if not accepted:
                    self._restore()
            finally:
                self._drop_gradients()
        predicted = _loss(damping * system.mean * coefficients)  # what the system leaves of the residual
        step = GaussNewtonStep(loss, predicted, measured, damping, accepted, after if accepted else fitted, outputs)
        if isinstance(self.kernel, str):
            self._warn(step, _loss(targets) * torch.finfo(y.dtype).eps)
        if self.adaptive:
            self._adapt(step, len(x))
        return step

    def _checked(self, x: Tensor, y: Tensor, at: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the kernel takes of x and of ``at``, and y as (N, out) in float64."""
        ours = self._ours
        with reading(self.model):
            samples = checked_samples(self.model, ours, "x", x)
            others = None if at is None else checked_samples(self.model, ours, "at", at)
            if not len(x):
                raise ValueError("x must have at least one sample, got none")
            if ours is None or ours.family is None:
                outputs = function_of(self.model, ours).outputs(samples).shape[1]
            else:
                outputs = ours.model.last_weight.shape[0]
        check_tensor("y", y)
        if y.shape != (len(x), outputs) and not (outputs == 1 and y.shape == (len(x),)):
            raise ValueError(f"y must have shape ({len(x)}, {outputs}), as the outputs, got {tuple(y.shape)}")
        check_alike("y", y, "the model", self._params[0])
        if not y.isfinite().all():
            raise ValueError("y must be finite, got NaN or infinity")
        if ours is not None and float(y.min()) <= -ours.model.scale:
            raise ValueError(
                f"y must be above -C_L = {-ours.model.scale:g}, where the right units of the network stop, got "
                f"{float(y.min()):g}: shift or scale the targets, or take a larger scale"
            )
        if self.kernel in ("features", "limit"):
            return samples, others, y.reshape(len(x), -1).double()
        return x, at, y.reshape(len(x), -1).double()

    def _outputs(self, x: Tensor, advance: Callable[[int], None]) -> Tensor:
        """(N, out), float64."""

        def of(rows: slice) -> Tensor:
            parts = []
            for part in x[rows].split(self.batch_size):
                parts.append(self.model(part).unsqueeze(-1).flatten(1).double())
                advance(len(part))
            return torch.cat(parts)

        with torch.no_grad():
            return self.ranks.rows(len(x), of)

    def _system(self, x: Tensor, samples: Tensor, outputs: int) -> System:
        """Of a constant kernel, kept for the next step on the same tensor."""
        kept = self._solved
        if kept is not None and kept[0] is x and kept[1] == x._version:
            return kept[2]
        self._solved = None  # frees it before the next one is made
        system = self._kernel.system(samples, outputs, self._budget)
        if self._kernel.constant:
            self._solved = x, x._version, system
        return system

    def _backward(self, x: Tensor, coefficients: Tensor, advance: Callable[[int], None]) -> None:
        """``.grad = J^T coefficients``."""
        self._drop_gradients()
        share = self.ranks.share(len(x))
        parts = (of[share].split(self.batch_size) for of in (x.detach(), coefficients))
        with torch.enable_grad():
            for part, rows in zip(*parts, strict=True):
                out = self.model(part)
                out.backward(rows.to(out.dtype).reshape(out.shape))
                advance(len(part))
        self.ranks.sum_(*(param.grad for param in self._params if param.grad is not None))
        if not all(param.grad is None or param.grad.isfinite().all() for param in self._params):
            raise RuntimeError("the step is not finite: the model is as it was (take a larger damping)")

    @torch.no_grad()
    def _move(self) -> None:
        """Take the step. ``.grad`` holds the parameters before it from then on, so that no third copy is needed."""
        for param in self._params:
            if param.grad is not None:
                rows = max(1, _BLOCK // max(1, param[:1].numel())) if param.dim() else 1
                for now, grad in zip(_rows(param, rows), _rows(param.grad, rows), strict=True):
                    after = torch.add(now, grad, alpha=self._rate)
                    grad.copy_(now)
                    now.copy_(after)

    @torch.no_grad()
    def _restore(self) -> None:
        for param in self._params:
            if param.grad is not None:
                param.copy_(param.grad)

    def _drop_gradients(self) -> None:
        for param in self._params:
            param.grad = None

    def _warn(self, step: GaussNewtonStep, rounding: float) -> None:
        """Once, where a step does less than half of what the kernel predicts, but for rounding."""
        expected = step.loss - step.predicted
        if self._warned or expected <= rounding or step.loss - step.measured >= expected / 2:
            return
        self._warned = True
        warnings.warn(
            f"the step has taken the loss from {step.loss:.3g} to {step.measured:.3g} where the kernel predicts "
            f"{step.predicted:.3g}: the model has moved too far for kernel={self.kernel!r} with "
            f"damping={step.damping:g} (a larger scale keeps it linear, a larger damping takes smaller steps)",
            UserWarning,
            stacklevel=3,
        )

    def _adapt(self, step: GaussNewtonStep, samples: int) -> None:
        if not step.accepted:
            self.damping = max(step.damping, _LEAST_RAISED) * self._growth
            self._growth *= 2
            return
        self._growth = 2.0
        gain = (step.loss - step.measured) / max(step.loss - step.predicted, torch.finfo(torch.float64).tiny)
        lowered = step.damping * max(1 / 3, 1 - (2 * min(gain, 1.0) - 1) ** 3)
        # Below this a system may be singular to rounding: lambda_max is at most the trace.
        self.damping = max(lowered, min(step.damping, 4 * samples**2 * EPS))

    def state_dict(self) -> dict[str, Any]:
        """What a run goes on from, bit for bit: the damping and its growth and, of ``kernel="features"``, what the
        features are made of, which a trained model no longer has."""
        kept = dataclasses.asdict(self._kernel.features) if isinstance(self._kernel, FeatureKernel) else None
        return {"damping": self.damping, "growth": self._growth, "warned": self._warned, "features": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The way back, into an optimizer with the same arguments for a model of the same sizes.

        With ``kernel="features"`` make the optimizer for a fresh model, before the trained parameters are loaded.

        Raises: TypeError or ValueError, before anything is changed, naming what does not fit.
        """
        if not isinstance(state_dict, dict) or set(state_dict) != {"damping", "growth", "warned", "features"}:
            raise ValueError(f"state_dict must be a GramGaussNewton's, got {shown(state_dict)}")
        damping = check_number("damping", state_dict["damping"])
        growth = check_number("growth", state_dict["growth"], positive=True)
        kernel, found = self._kernel, state_dict["features"]
        if (found is not None) != isinstance(kernel, FeatureKernel):
            raise ValueError(f"state_dict must be of an optimizer with kernel={self.kernel!r}")
        if isinstance(kernel, FeatureKernel):
            kernel = FeatureKernel(kernel.features.like(found), self.ranks)
        self.damping, self._growth, self._warned = damping, growth, bool(state_dict["warned"])
        self._kernel, self._solved = kernel, None


def _rows(tensor: Tensor, count: int) -> tuple[Tensor, ...]:
    return tensor.split(count) if tensor.dim() else (tensor,)


def _loss(residual: Tensor) -> float:
    return float(residual.square().sum()) / (2 * len(residual))
