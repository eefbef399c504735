"""The kernels that GramGaussNewton can step with: each makes a system that fits in a budget, and products."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from narrowdeep.distributed.ranks import ALONE, Ranks
from narrowdeep.memory.planning import format_bytes
from narrowdeep.modules import DeepNarrowCNN
from narrowdeep.ntk.empirical import empirical_ntk, ntk_vector_product
from narrowdeep.ntk.features import InitialFeatures
from narrowdeep.ntk.limit import limit_ntk_cnn, limit_ntk_mlp
from narrowdeep.ntk.network import Ours
from narrowdeep.optim.systems import FeatureSystem, ProductSystem, SampleSystem, System, add_gram

_BLOCK_BYTES = 1 << 28
"""What the features, or the rows of a kernel, of one block of samples may take."""

_FEW = 4096
"""Features of the system that conjugate gradients start from, about."""


class Kernel(Protocol):
    constant: bool
    """Whether it stays the same while the model is trained."""
    reads_samples: bool
    """Whether it takes samples as a narrow model does, after the modules before it."""

    def system(self, x: Tensor, outputs: int, budget: int, advance: Callable[[float], None]) -> System:
        """``advance`` may be called with parts of it that are done, of 1 in all."""

    def product(self, x1: Tensor, x2: Tensor, v: Tensor) -> Tensor:
        """``K(x1, x2) v``, (N1, out), float64."""


class FeatureKernel:
    """The kernel at initialisation, in its features, which stay while the model is trained."""

    constant, reads_samples = True, True

    def __init__(self, features: InitialFeatures, ranks: Ranks = ALONE) -> None:
        self.features, self._ranks = features, ranks

    def system(self, x: Tensor, outputs: int, budget: int, advance: Callable[[float], None]) -> System:
        samples, count = x.shape[0], self.features.count(x.shape[1])
        if count < samples and _factorised(count) <= budget:
            keep = _factorised(count) + 8 * samples * count <= budget
            return FeatureSystem(self.features.matrix, x, self._rows(count), keep, self._ranks, advance)
        if _factorised(samples) <= budget:
            kernel = torch.zeros(samples, samples, dtype=torch.float64, device=x.device)
            for block in self.features.blocks(x):
                add_gram(kernel, block, block.T)
                advance(block.shape[1] / count)
            return SampleSystem(kernel)
        _say_too_large(min(samples, count), budget)
        # Some of the layers make a system that is near enough to start from.
        few = self.features.thinned(-(-count // min(_FEW, 1 + math.isqrt(budget // 8))))
        rows = self._rows(few.count(x.shape[1]))
        near = FeatureSystem(few.matrix, x, rows, ranks=self._ranks, advance=advance)
        mean = sum(float(block.square().sum()) for block in self.features.blocks(x)) / samples
        return ProductSystem(lambda v: self.product(x, x, v), mean, near)

    def product(self, x1: Tensor, x2: Tensor, v: Tensor) -> Tensor:
        both = x1 if x1 is x2 else torch.cat([x1, x2])
        out = v.new_zeros(len(x1), v.shape[1], dtype=torch.float64)
        for block in self.features.blocks(both):
            out.addmm_(block[: len(x1)], block[len(block) - len(x2) :].T @ v.double())
        return out

    def _rows(self, count: int) -> int:
        return max(1, _BLOCK_BYTES // (8 * count))


class EmpiricalKernel:
    """The kernel of the model as it is now."""

    constant, reads_samples = False, False

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def system(self, x: Tensor, outputs: int, budget: int, advance: Callable[[float], None]) -> System:
        if _factorised(len(x) * outputs) <= budget:
            return SampleSystem(empirical_ntk(self.model, x))
        _say_too_large(len(x) * outputs, budget)
        few = empirical_ntk(self.model, x[:: max(1, len(x) // 16)], reduce="trace")
        return ProductSystem(lambda v: self.product(x, x, v), float(few.diagonal().mean()) / outputs)

    def product(self, x1: Tensor, x2: Tensor, v: Tensor) -> Tensor:
        return ntk_vector_product(self.model, x1, x2, v.to(x2.dtype)).double()


class FunctionKernel:
    """``function(x1, x2)``, (N1, N2) or (N1, N2, out, out), scaled as the model's own kernel."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any], *, limit: bool) -> None:
        self.function, self.constant, self.reads_samples = function, limit, limit

    def system(self, x: Tensor, outputs: int, budget: int, advance: Callable[[float], None]) -> System:
        first = self._evaluate(x[:1], x[:1])
        size = len(x) * (outputs if first.dim() == 4 else 1)
        if _factorised(size) <= budget:
            return SampleSystem(self._symmetric(x))
        _say_too_large(size, budget)
        diagonal = [self._evaluate(one, one).flatten().sum() for one in x[:: max(1, len(x) // 16)].split(1)]
        mean = float(torch.stack(diagonal).mean()) / (outputs if first.dim() == 4 else 1)
        return ProductSystem(lambda v: self.product(x, x, v), mean)

    def product(self, x1: Tensor, x2: Tensor, v: Tensor) -> Tensor:
        v, parts = v.double(), []
        for rows in x1.split(max(1, _BLOCK_BYTES // (8 * v.numel()))):
            kernel = self._evaluate(rows, x2)
            parts.append(torch.einsum("ijab,jb->ia", kernel, v) if kernel.dim() == 4 else kernel @ v)
        return torch.cat(parts)

    def _symmetric(self, x: Tensor) -> Tensor:
        kernel = self._evaluate(x, x)
        turned = kernel.transpose(0, 1)
        if kernel.dim() == 4:
            turned = turned.transpose(2, 3)
        largest = kernel.abs().max()
        if any((rows - columns).abs().max() > 1e-4 * largest for rows, columns in zip(kernel, turned, strict=True)):
            raise ValueError("kernel must be symmetric: kernel(x) is not equal to its transpose")
        return kernel.clone()  # the function may have kept it

    def _evaluate(self, x1: Tensor, x2: Tensor) -> Tensor:
        kernel = torch.as_tensor(self.function(x1, x2), device=x1.device).detach()
        if kernel.dim() not in (2, 4) or kernel.shape[:2] != (len(x1), len(x2)):
            sizes = f"{len(x1)}, {len(x2)}"
            raise ValueError(f"kernel must give ({sizes}) or ({sizes}, out, out), got {tuple(kernel.shape)}")
        return kernel.double()


def limit_kernel(ours: Ours) -> FunctionKernel:
    """The kernel of infinite depth with the model's rho and beta."""
    model = ours.model
    settings: dict[str, Any] = {"rho": model.rho, "beta": model.beta}

    def kernel(x1: Tensor, x2: Tensor) -> Tensor:
        if isinstance(model, DeepNarrowCNN):
            return limit_ntk_cnn(x1, x2, kernel_size=model.kernel_size, out_channels=model.out_channels, **settings)
        return limit_ntk_mlp(x1, x2, out_features=model.out_features, **settings)

    return FunctionKernel(kernel, limit=True)


def _factorised(size: int) -> int:
    """Bytes of a matrix that shares them with its Cholesky factor."""
    return 8 * size * size


def _say_too_large(size: int, budget: int) -> None:
    warnings.warn(
        f"the system of {size} unknowns would take {format_bytes(_factorised(size))}, more than budget="
        f"{format_bytes(budget)}: it is solved by conjugate gradients",
        UserWarning,
        stacklevel=5,
    )
