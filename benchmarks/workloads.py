"""What the benchmarks compute, defined once: the networks, their data, their right answers and their operations.

Every peer (``benchmarks.peers``) gets the same ``Problem`` and must give the ``truth`` before it is timed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.functional import Form
from narrowdeep.modules.base import PARAMETER_NAMES

Measure = Literal["forward", "forward + backward", "step with SGD", "NTK"]
Answer = dict[str, Tensor]
"""``output`` (B, out) and, where a backward ran, one gradient per name in PARAMETER_NAMES; or ``NTK``."""

TRUTH_SAMPLES = 3
"""Samples of the kernel whose truth is computed: an explicit float64 Jacobian of all would take gigabytes."""

PERTURBATION = 0.1
"""How far, relative to C_L, random weights move the output from its value at initialisation, which is exactly 0."""


@dataclass(frozen=True)
class Workload:
    """One network of at least 3 layers on one batch.

    ``image`` is (H, W) for a CNN, None for an MLP; ``floors[measure][peer]`` is the least ratio of the peer's time to
    narrowdeep's, and ``floors[measure]["peak"]`` the least share of the machine's FMA peak. Its keys are what is
    measured. ``shallow`` lets torch.compile take part, whose time to compile grows with the depth.
    """

    inputs: int
    outputs: int
    depth: int
    batch: int
    floors: Mapping[Measure, Mapping[str, float]] = field(hash=False)
    image: tuple[int, int] | None = None
    kernel_size: int = 3
    form: Form = "offset"
    shallow: bool = False

    @property
    def width(self) -> int:
        return self.inputs + 1 + self.outputs

    @property
    def name(self) -> str:
        if self.image is None:
            network = f"MLP {self.inputs} to {self.outputs} (width {self.width})"
        else:
            size, (height, columns) = self.kernel_size, self.image
            network = f"CNN {self.width} channels {height}x{columns}, {size}x{size} filters"
        return f"{network}{', plain form' if self.form == 'plain' else ''}, L={self.depth}, B={self.batch}"

    @property
    def parameters(self) -> int:
        """Numbers in all weights and biases."""
        taps = self.kernel_size ** len(self.image or ())
        weights = (self.width**2 * (self.depth - 2) + self.width * (self.inputs + self.outputs)) * taps
        return weights + self.width * (self.depth - 1) + self.outputs

    def traffic(self, measure: Measure) -> int | None:
        """Bytes in float32 that the answer needs from memory and writes there; None for kernels. Parameters are read
        once by a forward, once more by a backward, which writes as many gradients, and a step reads both and writes the
        parameters; states may stay in the cache."""
        times = {"forward": 1, "forward + backward": 3, "step with SGD": 6}
        samples = self.batch * (self.inputs * math.prod(self.image or ()) + self.outputs)
        return 4 * (times[measure] * self.parameters + samples) if measure in times else None

    def dependent(self, measure: Measure) -> int | None:
        """Operations that wait for one another; None for kernels. In each layer, forward and backward: a product, the
        tree of additions that sums them, and three for the bias or the mask, the identity part and the clip."""
        if measure == "NTK":
            return None
        products = self.width * self.kernel_size ** len(self.image or ())
        return (1 if measure == "forward" else 2) * self.depth * (4 + math.ceil(math.log2(products)))

    def flops(self, measure: Measure) -> int | None:
        """Floating-point operations the answer needs, a multiply-add as two; None for kernels.

        Padding is not work: taps of a filter that fall outside the image do not count. Neither does what
        checkpointing computes twice, nor the O(width) work of biases and ReLU.
        """
        if measure == "NTK":
            return None
        taps = 1
        for size in self.image or ():
            reach = range(-(self.kernel_size // 2), self.kernel_size // 2 + 1)
            taps *= sum(max(0, size - abs(shift)) for shift in reach)
        inner, outer = self.width**2 * (self.depth - 2), self.width * (self.inputs + self.outputs)
        layers = 2 * self.batch * taps * (inner + outer)
        if measure == "forward":
            return layers
        # The backward multiplies once for the weights and once for the state, which layer 1 does not need.
        return 3 * layers - 2 * self.batch * taps * self.width * self.inputs


MLP_WORKLOADS = (
    Workload(2, 1, 10000, 128, {"forward": {"eager": 250}, "forward + backward": {"eager": 200, "JAX scan": 20}}),
    Workload(2, 1, 10000, 1, {"forward": {"eager": 500}}),
    Workload(
        64,
        10,
        4000,
        128,
        {"forward": {"eager": 3}, "forward + backward": {"eager": 3}, "step with SGD": {"eager": 3.5}},
    ),
    Workload(11, 11, 4000, 57, {"forward + backward": {"eager": 10}}),
    Workload(784, 10, 50, 128, {"forward + backward": {"eager": 0.95}}),
    Workload(2, 1, 10000, 128, {"forward": {"peak": 0.55}}, form="plain"),
    Workload(2, 1, 100, 128, {"forward": {}, "forward + backward": {}}, shallow=True),
)
CNN_WORKLOADS = (
    Workload(
        1, 1, 1000, 128, {"forward": {"eager": 12}, "forward + backward": {"eager": 8, "JAX scan": 8}}, image=(7, 7)
    ),
    Workload(1, 1, 1000, 512, {"forward + backward": {"eager": 8}}, image=(7, 7)),
    Workload(1, 10, 1000, 128, {"forward": {"eager": 1.5}, "forward + backward": {"eager": 1.8}}, image=(7, 7)),
    Workload(2, 2, 300, 37, {"forward + backward": {"eager": 2}}, image=(9, 6), kernel_size=5),
)
NTK_WORKLOADS = (
    Workload(2, 1, 10000, 64, {"NTK": {"torch.func": 150}}),
    Workload(2, 1, 1000, 64, {"NTK": {"torch.func": 60}}),
    Workload(1, 1, 1000, 32, {"NTK": {"torch.func": 20}}, image=(7, 7)),
    Workload(49, 10, 500, 32, {"NTK": {"torch.func": 10}}),
)
WORKLOADS = MLP_WORKLOADS + CNN_WORKLOADS + NTK_WORKLOADS


@dataclass(frozen=True)
class Problem:
    """A workload with numbers in it: float32 model, data (B, ...) and the gradient of a loss at the output (B, out)."""

    workload: Workload
    model: DeepNarrowMLP | DeepNarrowCNN
    x: Tensor
    cotangent: Tensor

    def sequential(self, dtype: torch.dtype = torch.float32) -> nn.Sequential:
        """The same network as eager layers. The identity part is added in float64 whatever the dtype."""
        return copy.deepcopy(self.model).double().to_sequential().to(dtype)


@torch.no_grad()
def make_problem(workload: Workload, seed: int = 0) -> Problem:
    """The network at initialisation plus random weights everywhere, so that no product is with a zero.

    The weights are large enough that plain float32 resolves them and every peer has the same truth to reach; after
    training they would be lost in the rounding of W = E + Delta.
    """
    torch.manual_seed(seed)
    model: DeepNarrowMLP | DeepNarrowCNN
    if workload.image is None:
        model = DeepNarrowMLP(workload.inputs, workload.outputs, workload.depth)
    else:
        model = DeepNarrowCNN(workload.inputs, workload.outputs, workload.depth, kernel_size=workload.kernel_size)
    for name in PARAMETER_NAMES:
        param = getattr(model, name)
        fan_in = math.prod(param.shape[2 if name.startswith("hidden") else 1 :]) if name.endswith("weight") else 1
        size = PERTURBATION / math.sqrt(workload.depth * fan_in)
        if name.endswith("bias") or name == "first_weight":
            size *= model.scale
        param += size * torch.randn_like(param)
    if workload.form == "plain":
        model = type(model).from_sequential(model.double().to_sequential(), form="plain").float()
    x = torch.randn(workload.batch, workload.inputs, *(workload.image or ()))
    return Problem(workload, model, x, torch.randn(workload.batch, workload.outputs))


def stacked_gradients(network: nn.Sequential) -> Answer:
    """Gradients of an eager network, stacked as the model's parameters are."""
    layers = [module for module in network if isinstance(module, nn.Linear | nn.Conv2d)]
    answer: Answer = {}
    for kind in ("weight", "bias"):
        first, *hidden, last = (getattr(layer, kind).grad for layer in layers)
        answer |= {f"first_{kind}": first, f"hidden_{kind}": torch.stack(hidden), f"last_{kind}": last}
    return answer


def jacobian_kernel(network: nn.Module, x: Tensor) -> Tensor:
    """Tangent kernel (N, N, out, out), not scaled, as PyTorch's documentation does it: vmap(jacrev), then products."""
    params = {name: param.detach() for name, param in network.named_parameters()}

    def output(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(network, params, (sample.unsqueeze(0),)).squeeze(0)

    jacobians = torch.func.vmap(torch.func.jacrev(output), (None, 0))(params, x)
    kernel = None
    for name in list(jacobians):
        rows = jacobians.pop(name).flatten(2)
        part = torch.einsum("nap,mbp->nmab", rows, rows)
        kernel = part if kernel is None else kernel.add_(part)
    assert kernel is not None
    return kernel


def truth(problem: Problem, measure: Measure) -> Answer:
    """The answer in float64, through eager PyTorch."""
    network = problem.sequential(torch.float64)
    x = problem.x.double()
    if measure == "NTK":
        scale = problem.workload.depth * problem.model.scale**2
        return {"NTK": jacobian_kernel(network, x[:TRUTH_SAMPLES]) / scale}
    if measure == "forward":
        with torch.no_grad():
            return {"output": network(x)}
    output = network(x)
    output.backward(problem.cotangent.double())
    return {"output": output.detach(), **stacked_gradients(network)}


def check(answer: Answer, truth: Answer, tolerance: float) -> float:
    """The largest relative error (Frobenius norms) among the parts of ``answer``.

    Raises: AssertionError when it is above ``tolerance`` or a part is missing: a wrong answer is not worth timing.
    """
    assert answer.keys() == truth.keys(), f"the answer must have {sorted(truth)}, got {sorted(answer)}"
    worst = 0.0
    for name, right in truth.items():
        got = answer[name].double()
        assert got.shape == right.shape, f"{name} must have shape {tuple(right.shape)}, got {tuple(got.shape)}"
        error = float((got - right).norm() / right.norm())
        assert error <= tolerance, f"{name} is off by {error:.1e} relative, more than {tolerance:.0e}: not timed"
        worst = max(worst, error)
    return worst
