"""Who takes part: eager PyTorch, eager with checkpointing, torch.compile, JAX scan, torch.func, and narrowdeep.

A peer is made for one problem. ``run(measure)`` is the work that is timed; ``answer(measure)`` is what the last run
found, taken outside the timing. Forward runs record no graph; every backward first drops the old gradients.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

from benchmarks.workloads import TRUTH_SAMPLES, Answer, Measure, Problem, Workload, jacobian_kernel, stacked_gradients
from narrowdeep.modules.base import PARAMETER_NAMES
from narrowdeep.ntk import empirical_ntk

PLAIN_TOLERANCE = 1e-2
"""Float32 with W and b: rounding of a state of size C_L in every layer, and ReLUs that it switches."""
OFFSET_TOLERANCE = 1e-4


class Peer(ABC):
    """One way to do the work of ``problem``."""

    name: ClassVar[str]
    measures: ClassVar[tuple[Measure, ...]]
    tolerance = PLAIN_TOLERANCE

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.x, self.cotangent = problem.x, problem.cotangent

    @classmethod
    def takes(cls, workload: Workload, measure: Measure) -> bool:
        return measure in cls.measures

    @abstractmethod
    def run(self, measure: Measure) -> None: ...

    @abstractmethod
    def answer(self, measure: Measure) -> Answer: ...


class TorchPeer(Peer):
    """A torch network under autograd."""

    measures: ClassVar[tuple[Measure, ...]] = ("forward", "forward + backward", "step with SGD")

    def __init__(self, problem: Problem, network: nn.Module) -> None:
        super().__init__(problem)
        self.network = network
        self.parameters = list(network.parameters())
        # The rate moves the weights, but so little that the thousandth step does the work of the first.
        self.optimizer = torch.optim.SGD(self.parameters, lr=1e-3 * problem.model.ntk_lr, fused=True)

    def apply(self) -> Tensor:
        return self.network(self.x)

    def run(self, measure: Measure) -> None:
        if measure == "forward":
            with torch.no_grad():
                self.output = self.apply()
            return
        for param in self.parameters:
            param.grad = None
        output = self.apply()
        output.backward(self.cotangent)
        if measure == "step with SGD":
            self.optimizer.step()
        self.output = output.detach()

    @abstractmethod
    def gradients(self) -> Answer: ...

    def answer(self, measure: Measure) -> Answer:
        return {"output": self.output, **(self.gradients() if measure != "forward" else {})}


class Eager(TorchPeer):
    name = "eager"

    def __init__(self, problem: Problem) -> None:
        self.layers = problem.sequential()
        super().__init__(problem, self.layers)

    def gradients(self) -> Answer:
        return stacked_gradients(self.layers)


class CheckpointedEager(Eager):
    """``checkpoint_sequential`` with about sqrt(L) segments."""

    name = "eager, checkpointed"
    measures = ("forward + backward", "step with SGD")

    def apply(self) -> Tensor:
        return checkpoint_sequential(self.layers, math.isqrt(self.problem.workload.depth), self.x, use_reentrant=False)


class Compiled(Eager):
    """torch.compile; shallow networks only: it takes about a second to compile ten layers."""

    name = "torch.compile"
    measures = ("forward", "forward + backward")

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        torch.compiler.reset()
        self.network = torch.compile(self.layers)  # type: ignore[assignment]

    @classmethod
    def takes(cls, workload: Workload, measure: Measure) -> bool:
        return workload.shallow and super().takes(workload, measure)


class Narrowdeep(TorchPeer):
    name = "narrowdeep"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, problem.model)
        self.tolerance = OFFSET_TOLERANCE if problem.workload.form == "offset" else PLAIN_TOLERANCE

    def gradients(self) -> Answer:
        grads = {name: getattr(self.problem.model, name).grad for name in PARAMETER_NAMES}
        return {name: grad for name, grad in grads.items() if grad is not None}


class JaxScan(Peer):
    """``jax.lax.scan`` over the stacked hidden layers, jitted; values and gradients come from ``value_and_grad``."""

    name = "JAX scan"
    measures = ("forward", "forward + backward")

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_platforms", "cpu")
        layers = [m for m in problem.sequential() if isinstance(m, nn.Linear | nn.Conv2d)]
        stacks: Answer = {}
        for kind in ("weight", "bias"):
            first, *hidden, last = (getattr(layer, kind).detach() for layer in layers)
            stacks |= {f"first_{kind}": first, f"hidden_{kind}": torch.stack(hidden), f"last_{kind}": last}
        self.params = {name: jnp.asarray(value.numpy()) for name, value in stacks.items()}
        self.inputs, self.weights = jnp.asarray(self.x.numpy()), jnp.asarray(self.cotangent.numpy())
        image = problem.workload.image is not None

        def affine(weight: Any, bias: Any, h: Any) -> Any:
            if not image:
                return h @ weight.T + bias
            return jax.lax.conv_general_dilated(h, weight, (1, 1), "SAME") + bias[:, None, None]

        def network(params: dict[str, Any], x: Any) -> Any:
            def layer(h: Any, parameters: tuple[Any, Any]) -> tuple[Any, None]:
                return jax.nn.relu(affine(*parameters, h)), None

            h = jax.nn.relu(affine(params["first_weight"], params["first_bias"], x))
            h, _ = jax.lax.scan(layer, h, (params["hidden_weight"], params["hidden_bias"]))
            out = affine(params["last_weight"], params["last_bias"], h)
            return out.mean((2, 3)) if image else out

        def loss(params: dict[str, Any], x: Any, weights: Any) -> tuple[Any, Any]:
            output = network(params, x)
            return (output * weights).sum(), output

        self.block = jax.block_until_ready
        self.network = jax.jit(network)
        self.value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run(self, measure: Measure) -> None:
        if measure == "forward":
            self.result = self.block(self.network(self.params, self.inputs))
        else:
            self.result = self.block(self.value_and_grad(self.params, self.inputs, self.weights))

    def answer(self, measure: Measure) -> Answer:
        if measure == "forward":
            return {"output": torch.from_numpy(np.array(self.result))}
        (_, output), grads = self.result
        return {name: torch.from_numpy(np.array(value)) for name, value in {"output": output, **grads}.items()}


class KernelPeer(Peer):
    """A tangent kernel of the whole batch with itself, scaled by 1 / (L C_L^2)."""

    measures = ("NTK",)
    kernel: Tensor

    def answer(self, measure: Measure) -> Answer:
        return {"NTK": self.kernel[:TRUTH_SAMPLES, :TRUTH_SAMPLES]}


class TorchFunc(KernelPeer):
    name = "torch.func"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.network = problem.sequential()
        self.scale = problem.workload.depth * problem.model.scale**2

    def run(self, measure: Measure) -> None:
        self.kernel = jacobian_kernel(self.network, self.x) / self.scale


class NarrowdeepKernel(KernelPeer):
    name = "narrowdeep"
    tolerance = OFFSET_TOLERANCE

    def run(self, measure: Measure) -> None:
        self.kernel = empirical_ntk(self.problem.model, self.x)


PEERS: tuple[Any, ...] = (Eager, CheckpointedEager, Compiled, JaxScan, TorchFunc, Narrowdeep, NarrowdeepKernel)
