"""Gauss-Newton steps in function space, for networks whose tangent kernel hardly moves.

More than 400 lines, a third of which say what its arguments are: one step is one story.
"""

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
from narrowdeep.ntk.spectrum import as_momentum
from narrowdeep.optim.chunkwise import ChunkwisePass
from narrowdeep.optim.fused_sgd import STEPPED
from narrowdeep.optim.initial_step import InitialStep
from narrowdeep.optim.kernels import EmpiricalKernel, FeatureKernel, FunctionKernel, Kernel, limit_kernel
from narrowdeep.optim.losses import ClosureLoss, Loss, SquaredLoss
from narrowdeep.optim.parameters import Parameters
from narrowdeep.optim.systems import EPS, System

KernelName = Literal["features", "empirical", "limit"]
_LEAST_RAISED = 1e-6
"""What a damping of 0 is raised from."""


@dataclass(frozen=True)
class GaussNewtonStep:
    """What one step has done. Losses are ``1/(2N) sum ||f - y||^2``, or the closure's, over the samples of the step.

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
    """Gauss-Newton by the Gram matrix of the tangents: no learning rate, at most one backward pass a step.

    Where a model is linear in its parameters, the step

        theta += J^T (K + lambda I)^-1 (y - f) / (L C_L^2),    K = J J^T / (L C_L^2)

    ends at the kernel's own ridge regression of y (Cai et al., "Gram-Gauss-Newton method", 2019; Zhang, Martens and
    Grosse, "Fast convergence of natural gradient descent for overparameterized neural networks", 2019). A step measures
    f, solves the system, sends its solution backward through the network as the gradient of the outputs, and measures
    again. Narrow models are linear in this sense up to about 1/C_L (thesis section 3.2). For other modules there is no
    L C_L^2 in either formula. The first step of a network at its initialisation with ``kernel="features"`` runs it only
    to measure: there J is known in closed form.

    The loss is ``1/(2N) sum ||f - y||^2``. Any other that is convex in the outputs, such as cross-entropy, is given as
    a closure, as to an optimizer of torch. With its gradient g and Hessian H at f the system is that of the generalised
    Gauss-Newton matrix, ``(H K + lambda I) a = -g`` (Schraudolph, "Fast curvature matrix-vector products", 2002).
    Newton's method in function space, which solves such systems and never runs the model, finds the minimum of the
    linear model before the one backward pass. ``.grad`` is None after a step. In float32 the residual is a little above
    the predicted one; the next step takes it up.

    A step may take a mini-batch, which without momentum undoes some of what others have learned. ``momentum`` keeps v,
    the way that the parameters have still to go by all batches so far: of the ways that fit the batch, the one nearest
    to what is left of the last one, ``v <- momentum v + J^T (K + lambda I)^-1 (y - f - momentum J v)``, and the step is
    ``(1 - momentum) v`` (SPRING: Goldshlager, Abrahamsen and Lin, "A Kaczmarz-inspired approach", 2024). 0.9 is usual;
    0 is best where a step takes all samples.

    Arguments:
        model: as in ``narrowdeep.ntk.empirical_ntk``; parameters with ``requires_grad=False`` stay as they are.
        damping: lambda over the mean of K's diagonal, finite and not negative.
        adaptive: lower and raise the damping by the measured decrease against the predicted one (Levenberg and
            Marquardt, by the rule of Nielsen, 1999), and take a step back that has not lowered the loss. False: take
            every step, with this damping. A narrow model of several chunks then moves chunk by chunk, and the gradients
            of all of them never exist at once.
        kernel: "features", the kernel at initialisation, which the model must be at now (``narrowdeep.ntk.features``);
            "empirical", the kernel as it is at each step, from a backward for each output; "limit", that of infinite
            depth; or ``kernel(x1, x2)``, (N1, N2) for every output or (N1, N2, out, out), called at every step.
        momentum: in [0, 1); above 0 it takes a buffer of the parameters' size. A step that is taken back empties it.
        batch_size: samples of one forward or backward.
        budget: bytes that a matrix may take, which its factor shares, as an int or text ("4GiB", 23,170 unknowns).
            Smaller systems go by Cholesky, in features where they are fewer than the samples; larger ones by conjugate
            gradients.
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
        momentum: float = 0.0,
        kernel: KernelName | Callable[[Tensor, Tensor], Any] = "empirical",
        batch_size: int = 1024,
        budget: int | str = "4GiB",
        ranks: Ranks = ALONE,
    ) -> None:
        check_module("model", model)
        self.damping, self.momentum = check_number("damping", damping), as_momentum(momentum)
        self.batch_size = check_count("batch_size", batch_size, 1)
        self._budget = parse_bytes(budget)
        if not isinstance(adaptive, bool):
            raise TypeError(f"adaptive must be True or False, got {shown(adaptive)}")
        if ranks.size > 1 and self.momentum:
            raise ValueError(f"momentum must be 0 with several ranks, got {momentum}")
        if not callable(kernel) and kernel not in ("features", "empirical", "limit"):
            raise ValueError(f"kernel must be 'features', 'empirical', 'limit' or a callable, got {shown(kernel)}")
        self.model, self.adaptive, self.kernel, self.ranks = model, adaptive, kernel, ranks
        self._ours = find(model)
        rate = 1.0 if self._ours is None else self._ours.model.ntk_lr
        self._params = Parameters([p for p in model.parameters() if p.requires_grad], rate, self.momentum)
        if not self._params.params:
            raise ValueError("model must have a parameter that requires gradients, got none")
        if any(id(param) in STEPPED for param in self._params.params):
            raise ValueError("model must not have parameters of a FusedSGD: call remove() on that one first")
        self._kernel = self._make_kernel()
        if self.momentum and not function_of(model, self._ours).transformable:
            raise ValueError("model must be differentiable in forward mode for momentum, got chunks behind parameters")
        self._growth = 2.0
        self._warned = False
        self._solved: tuple[Tensor, int, System] | None = None

    def _make_kernel(self) -> Kernel:
        if callable(self.kernel):
            return FunctionKernel(self.kernel, limit=False)
        if self.kernel == "features":
            return FeatureKernel(InitialFeatures.of(self.model, self._ours), self.ranks)
        if self.kernel == "empirical":
            return EmpiricalKernel(self.model)
        if self._ours is None or self._ours.family is None:
            raise ValueError(f"model must be a narrow model for kernel='limit', got {type(self.model).__name__}")
        if len(self._params.params) < len(list(self.model.parameters())):
            raise ValueError("model must have no frozen parameters for kernel='limit', which counts all of them")
        return limit_kernel(self._ours)

    def step(
        self,
        x: Tensor | Callable[[], Any],
        y: Tensor | None = None,
        *,
        at: Tensor | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> GaussNewtonStep:
        """One step on the samples x with targets y, or on the loss of a closure.

        Arguments:
            x: (N, ...), as the model takes it; the same tensor at every step keeps a constant kernel's system. Or a
                closure that calls the model once, with such a tensor, and returns the loss of its outputs, without
                ``backward``: ``lambda: F.cross_entropy(model(x), labels)``. The model does not run for it: outputs that
                are known stand for it, many times.
            y: of the shape, dtype and device of ``model(x)``; above -C_L for a narrow model, whose right units stop
                there. None with a closure.
            at: other samples, whose outputs after the step the kernel predicts.
            on_batch: called with (samples done, samples in all), of all ranks about, after each forward and backward,
                and as the kernel's system is made, which counts as a pass over all samples.

        Raises: TypeError or ValueError naming the argument, the rule and the value, before any kernel runs;
            numpy.linalg.LinAlgError, with the smallest damping that works, for a system that is singular; ValueError
            for a closure whose loss is not convex in the outputs.
        """
        closure = None
        if not isinstance(x, Tensor) and callable(x):
            if y is not None:
                raise ValueError("y must be left out with a closure, which has targets of its own")
            if self.ranks.size > 1:
                raise ValueError(f"x must be a tensor with several ranks, got a closure on {self.ranks.size} of them")
            closure = ClosureLoss(self.model, x)
            x = closure.x
        samples, others, targets = self._checked(x, y, at, closure is not None)
        function: Loss = SquaredLoss(targets) if closure is None else closure
        initial = self._initial_step(samples, *(() if others is None else (others,)))
        passes = 4 if initial is None else 3
        done, total, share = 0.0, passes * len(x), self.ranks.share(len(x))
        own = passes * (share.stop - share.start)

        def advance(count: float) -> None:
            nonlocal done
            done += count
            if on_batch is not None:
                on_batch(round(total * done / own) if own else total, total)

        with exact({param.device.type for param in self._params.params}):
            chunkwise = self._chunkwise(samples) if initial is None else None
            if chunkwise is not None:
                given = chunkwise.outputs(advance)
            else:
                given = self._outputs(x, advance) if initial is None else initial.outputs(samples)
            fitted = given.reshape(len(x), -1).double()
            if not fitted.isfinite().all():
                raise ValueError("model must have finite outputs at x, got NaN or infinity")
            if closure is not None:
                closure.like(given)
            loss, damping = function.value(fitted), self.damping
            seen = samples if self._kernel.reads_samples else x
            system = self._system(x, seen, fitted.shape[1], lambda part: advance(part * (share.stop - share.start)))
            solution = function.solve(self._carried(samples, fitted), system, damping)
            # the same bits on all ranks
            coefficients, reached = (self.ranks.rows(len(x), of.__getitem__) for of in solution)
            predicted = function.value(self._part_of(fitted, reached))
            outputs = None
            if at is not None and others is not None:
                given_at = self._outputs(at, lambda _: None) if initial is None else initial.outputs(others)
                now = given_at.reshape(len(at), -1).double()
                points = others if self._kernel.reads_samples else at
                moved = self.ranks.rows(len(at), lambda rows: self._kernel.product(points[rows], seen, coefficients))
                outputs = self._part_of(now, self._carried(others, now) + moved)
            try:
                if initial is not None:
                    initial.move(samples, coefficients, self.ranks, advance)
                elif chunkwise is None:
                    self._backward(x, coefficients, advance)
                    self._params.move()
                else:
                    self._params.drop_gradients()
                    chunkwise.backward(coefficients, self._params.move_for_good, advance)
                after = self._outputs(x, advance).reshape(len(x), -1).double()
                measured = function.value(after)
                accepted = not self.adaptive or measured < loss
                if not accepted:
                    (self._params if initial is None else initial).restore()
            finally:
                self._params.drop_gradients()
        step = GaussNewtonStep(loss, predicted, measured, damping, accepted, after if accepted else fitted, outputs)
        if isinstance(self.kernel, str):
            self._warn(step, abs(function.value(torch.zeros_like(fitted))) * torch.finfo(given.dtype).eps)
        if self.adaptive:
            self._adapt(step, len(x))
        return step

    def _checked(
        self, x: Tensor, y: Tensor | None, at: Tensor | None, with_closure: bool
    ) -> tuple[Tensor, Tensor | None, Any]:
        """x and ``at`` as what is differentiated takes them, and y as (N, out) in float64."""
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
        if with_closure:
            return samples, others, None
        if y is None:
            raise TypeError("y must be given with x, or a closure in the place of both")
        check_tensor("y", y)
        if y.shape != (len(x), outputs) and not (outputs == 1 and y.shape == (len(x),)):
            raise ValueError(f"y must have shape ({len(x)}, {outputs}), as the outputs, got {tuple(y.shape)}")
        check_alike("y", y, "the model", self._params.params[0])
        if not y.isfinite().all():
            raise ValueError("y must be finite, got NaN or infinity")
        if ours is not None and float(y.min()) <= -ours.model.scale:
            raise ValueError(
                f"y must be above -C_L = {-ours.model.scale:g}, where the right units of the network stop, got "
                f"{float(y.min()):g}: shift or scale the targets, or take a larger scale"
            )
        return samples, others, y.reshape(len(x), -1).double()

    def _outputs(self, x: Tensor, advance: Callable[[float], None]) -> Tensor:
        """As the model gives them."""

        def of(rows: slice) -> Tensor:
            parts = []
            for part in x[rows].split(self.batch_size):
                parts.append(self.model(part))
                advance(len(part))
            return torch.cat(parts)

        with torch.no_grad():
            return self.ranks.rows(len(x), of)

    def _initial_step(self, *samples: Tensor) -> InitialStep | None:
        """Where the model is still the one that the features are of, on all ranks."""
        if not isinstance(self._kernel, FeatureKernel):
            return None
        found = InitialStep.of(self.model, self._kernel.features, self._params, self.adaptive, *samples)
        return None if self.ranks.any(found is None) else found

    def _chunkwise(self, samples: Tensor) -> ChunkwisePass | None:
        """Where no step is taken back, and there are chunks to move one after another."""
        ours = self._ours
        if self.adaptive or self.momentum or self.ranks.size > 1 or ours is None or ours.family is None:
            return None
        if ours.model.chunks == 1 or ours.tied():
            return None
        return ChunkwisePass(ours.model, samples, self.batch_size)

    def _part_of(self, outputs: Tensor, reached: Tensor) -> Tensor:
        """Where a step takes the outputs on the way to those that solve the system."""
        return reached if not self.momentum else outputs + (1 - self.momentum) * (reached - outputs)

    def _carried(self, samples: Tensor, outputs: Tensor) -> Tensor:
        """Where what momentum has left of the way takes the outputs: ``f + momentum J v``."""
        velocity = self._params.velocity
        if velocity is None:
            return outputs
        with reading(self.model):
            function = function_of(self.model, self._ours)
            change = dict(zip(function.params, velocity, strict=True))
            parts = []
            for part in samples.split(self.batch_size):
                found: Any = torch.func.jvp(lambda values, x=part: function(values, x), (function.params,), (change,))
                parts.append(found[1].double())
        return outputs + self.momentum * torch.cat(parts)

    def _system(self, x: Tensor, samples: Tensor, outputs: int, advance: Callable[[float], None]) -> System:
        """Of a constant kernel, kept for the next step on the same tensor."""
        kept = self._solved
        if kept is not None and kept[0] is x and kept[1] == x._version:
            advance(1.0)
            return kept[2]
        self._solved, left = None, 1.0  # frees it before the next one is made

        def advance_by(part: float) -> None:
            nonlocal left
            left -= part
            advance(part)

        system = self._kernel.system(samples, outputs, self._budget, advance_by)
        advance(left)
        if self._kernel.constant:
            self._solved = x, x._version, system
        return system

    def _backward(self, x: Tensor, coefficients: Tensor, advance: Callable[[float], None]) -> None:
        """``.grad = J^T coefficients``."""
        self._params.drop_gradients()
        share = self.ranks.share(len(x))
        parts = (of[share].split(self.batch_size) for of in (x.detach(), coefficients))
        with torch.enable_grad():
            for part, rows in zip(*parts, strict=True):
                out = self.model(part)
                out.backward(rows.to(out.dtype).reshape(out.shape))
                advance(len(part))
        self.ranks.sum_(*(param.grad for param in self._params.params if param.grad is not None))
        if not self._params.gradients_are_finite():
            raise RuntimeError("the step is not finite: the model is as it was (take a larger damping)")

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
        """What a run goes on from, bit for bit: the damping and its growth, the buffer of momentum and, of
        ``kernel="features"``, what the features are made of, which a trained model no longer has."""
        kept = dataclasses.asdict(self._kernel.features) if isinstance(self._kernel, FeatureKernel) else None
        velocity = self._params.velocity
        return {
            "damping": self.damping,
            "growth": self._growth,
            "warned": self._warned,
            "features": kept,
            "velocity": None if velocity is None else [part.clone() for part in velocity],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The way back, into an optimizer with the same arguments for a model of the same sizes.

        With ``kernel="features"`` make the optimizer for a fresh model, before the trained parameters are loaded.

        Raises: TypeError or ValueError, before anything is changed, naming what does not fit.
        """
        names = {"damping", "growth", "warned", "features", "velocity"}
        if not isinstance(state_dict, dict) or set(state_dict) != names:
            raise ValueError(f"state_dict must be a GramGaussNewton's, got {shown(state_dict)}")
        damping = check_number("damping", state_dict["damping"])
        growth = check_number("growth", state_dict["growth"], positive=True)
        kernel, found = self._kernel, state_dict["features"]
        if (found is not None) != isinstance(kernel, FeatureKernel):
            raise ValueError(f"state_dict must be of an optimizer with kernel={self.kernel!r}")
        if isinstance(kernel, FeatureKernel):
            kernel = FeatureKernel(kernel.features.like(found), self.ranks)
        velocity = state_dict["velocity"]
        if velocity is not None:
            shapes = [param.shape for param in self._params.params]
            if not self.momentum or [part.shape for part in velocity] != shapes:
                raise ValueError("state_dict must be of an optimizer with momentum for parameters of the same shapes")
            velocity = [part.to(param, copy=True) for part, param in zip(velocity, self._params.params, strict=True)]
        self.damping, self._growth, self._warned = damping, growth, bool(state_dict["warned"])
        self._kernel, self._solved, self._params.velocity = kernel, None, velocity
