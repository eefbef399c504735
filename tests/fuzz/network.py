"""A random network with its data, the same network in eager layers, and the transforms that both go through."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import narrowdeep
from narrowdeep.modules.base import PARAMETER_NAMES as NAMES
from narrowdeep.ops.cnn import op as cnn_op
from narrowdeep.ops.mlp import op as mlp_op
from tests.ops.chains import CONV, MLP, eager

MARGIN = {torch.float32: 1e-5, torch.float64: 1e-12}
"""A ReLU whose input is nearer to 0, relative to the largest of its layer, may go either way."""


class Skip(Exception):  # noqa: N818 (no error)
    """Nothing can be said of this case."""


class Relus(TorchFunctionMode):
    """Keeps what is given to ``torch.relu``."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.relu:
            self.inputs.append(args[0])
        return func(*args, **(kwargs or {}))

    def check(self, dtype: torch.dtype) -> None:
        for z in (z for z in self.inputs if z.numel()):
            if not float(z.abs().min()) > MARGIN[dtype] * float(z.abs().max()):
                raise Skip


def own_memory(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Torch's forward mode takes no tensor whose rows are one in memory."""
    return tuple(t.clone(memory_format=torch.contiguous_format) if 0 in t.stride() else t for t in tensors)


def double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return own_memory(*(t.detach().double() for t in tensors))


class Net:
    """Arguments of a chain, each perhaps with unusual strides, and what is known of them."""

    def __init__(self, rng: random.Random, of_module: bool = False) -> None:
        self.rng, image = rng, rng.random() < 0.35
        self.family, self.dtype = "cnn" if image else "mlp", rng.choice([torch.float32, torch.float64])
        self.offset = rng.random() < 0.6
        self.inputs, self.outputs = rng.choice([1, 1, 2, 3, 5]), rng.choice([1, 1, 2, 3, 4])
        self.layers = rng.choice([0, 1, 2, 5, 33] if image else [0, 1, 2, 3, 7, 31, 32, 33, 40])
        self.batch = rng.choice([0, 1, 2, 9] if image else [0, 1, 2, 3, 8, 17, 33])
        free = not (self.offset or of_module) and rng.random() < 0.4
        self.width = rng.choice([1, 2, 4, 9, 16]) if free else self.inputs + 1 + self.outputs
        self.scale = rng.choice([0.5, 1.0, 7.0, float(self.layers + 2), 300.0])
        self.tap: tuple[int, ...] = (rng.choice([1, 3, 3, 5]),) * 2 if image else ()
        self.image = (rng.randint(1, 6), rng.randint(1, 6)) if image else ()
        n, taps = self.width, math.prod(self.tap)
        spread = 0.5 / math.sqrt(n * taps * (self.layers + 1)) if self.offset else math.sqrt(2 / (n * taps))
        parts = []
        for shape, size in (((n, self.inputs), 0.5), ((self.layers, n, n), spread), ((self.outputs, n), 0.5)):
            parts += [torch.randn(*shape, *self.tap) * size, torch.randn(shape[:-1]) * 0.1]
        self.params = tuple(self.disguise(p.to(self.dtype)) for p in parts)
        self.x = self.samples(self.batch)
        self.ops = cnn_op.ops if image else mlp_op.ops
        self.tensors = (self.x, *self.params)
        self.tangents = tuple(torch.randn_like(t) for t in self.tensors)
        self.grad = self.disguise(torch.randn(self.batch, self.outputs, dtype=self.dtype))

    def named(self) -> dict[str, Any]:
        return {"x": self.x, **dict(zip(NAMES, self.params, strict=True))}

    def cuts(self, most: int) -> list[int]:
        """Layers of each of ``most`` chunks or fewer."""
        at = sorted(self.rng.sample(range(1, self.layers), min(most, self.layers) - 1)) if self.layers > 1 else []
        return [b - a for a, b in zip([0, *at], [*at, self.layers], strict=True)]

    def samples(self, count: int) -> Tensor:
        x = torch.rand(count, self.inputs, *self.image, dtype=self.dtype) + 0.05
        return self.disguise(torch.where(torch.rand_like(x) < self.rng.choice([0.0, 0.2]), -x, x))

    def disguise(self, tensor: Tensor) -> Tensor:
        """The same numbers with other strides, or where numbers of this type do not lie; or one row for all of them."""
        kind = self.rng.randrange(8)
        if kind == 0 and tensor.dim() > 1:
            return tensor.mT.contiguous().mT
        if kind == 1 and tensor.dim() > 1:
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == 2 and tensor.dim() > 1 and tensor.shape[0]:
            return tensor[:1].expand(tensor.shape)
        if kind == 3:
            return torch.stack((tensor, torch.full_like(tensor, math.nan)), -1)[..., 0]
        if kind == 4 and tensor.numel():
            data = bytearray(1) + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            return torch.frombuffer(data, dtype=tensor.dtype, offset=1).view(tensor.shape)
        return tensor

    def eager(self, x: Tensor, *params: Tensor) -> Tensor:
        return eager(CONV if self.image else MLP, (x, *params), self.scale, self.offset)

    def check_margin(self, *xs: Tensor, params: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The hidden states. Raises: Skip where a ReLU stands at its kink."""
        with Relus() as relus:
            for x in xs:
                self.eager(*double(x, *(params or self.params)))
        relus.check(self.dtype)
        return [z.relu() for z in relus.inputs]

    def settings(self) -> dict[str, Any]:
        return {"scale": self.scale, "form": "offset" if self.offset else "plain"}

    def model(self, sizes: tuple[Any, ...] = (), **changes: Any) -> Any:
        """A module; with this net's parameters, unless its sizes are given."""
        settings = {**self.settings(), "dtype": self.dtype} | changes
        if self.image:
            settings = {"kernel_size": self.tap[0]} | settings
        kind: Any = narrowdeep.DeepNarrowCNN if self.image else narrowdeep.DeepNarrowMLP
        model = kind(*(sizes or (self.inputs, self.outputs, self.layers + 2)), **settings)
        with torch.no_grad():
            for name, value in zip(NAMES, self.params if not sizes else (), strict=False):
                parts = model.in_chunks(name)
                for part, piece in zip(parts, value.split([p.shape[0] for p in parts]), strict=True):
                    part.copy_(piece)
        return model


# ---- transforms: f is the library's function or the eager layers; seeds are tangents of its tensors, grad of f(x) ----


def call(f, tensors, seeds, grad):
    return (f(*tensors),)


def no_grad(f, tensors, seeds, grad):
    with torch.no_grad():
        return (f(*[t.detach().requires_grad_() for t in tensors]),)


def inference(f, tensors, seeds, grad):
    with torch.inference_mode():
        return (f(*tensors).clone(),)


def backward(f, tensors, seeds, grad):
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = f(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, grad, materialize_grads=True)


def backward_twice(f, tensors, seeds, grad):
    """The second time through a graph that is retained."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = f(*leaves)
    torch.autograd.grad(out, leaves, grad, materialize_grads=True, retain_graph=True)
    return torch.autograd.grad(out, leaves, grad, materialize_grads=True)


def backward_of_some(f, tensors, seeds, grad):
    leaves = [t.detach().requires_grad_(i in (0, 3)) for i, t in enumerate(tensors)]
    return torch.autograd.grad(f(*leaves), [leaves[0], leaves[3]], grad, materialize_grads=True)


def jvp(f, tensors, seeds, grad):
    return torch.func.jvp(f, own_memory(*tensors), seeds)


def vjp(f, tensors, seeds, grad):
    out, pull = torch.func.vjp(f, *tensors)
    return out, *pull(grad)


def linearize(f, tensors, seeds, grad):
    out, push = torch.func.linearize(f, *own_memory(*tensors))
    return out, push(*seeds)


def dual_numbers(f, tensors, seeds, grad):
    ad = torch.autograd.forward_ad
    pairs = list(zip(own_memory(*tensors), seeds, strict=True))
    with ad.dual_level():
        primal, tangent = ad.unpack_dual(f(*(t if i % 2 else ad.make_dual(t, s) for i, (t, s) in enumerate(pairs))))
        return primal, torch.zeros_like(primal) if tangent is None else tangent


def per_sample(f, tensors, seeds, grad):
    def loss(x, g, *params):
        return (f(x[None], *params)[0] * g).sum()

    if not len(grad):  # eager convolutions fail
        raise Skip
    gradient = torch.func.grad(loss, (0, 2, 4, 5))
    return torch.func.vmap(gradient, (0, 0, *(None,) * 6))(tensors[0], grad, *tensors[1:])


def ensemble(f, tensors, seeds, grad):
    params = [torch.stack((t, t + 0.01 * s)) for t, s in zip(tensors[1:], seeds[1:], strict=True)]
    return (torch.func.vmap(f, (None, *(0,) * 6))(tensors[0], *params),)


def double_backward(f, tensors, seeds, grad):
    """Gradients of the gradients along the seeds."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    grads = torch.autograd.grad(f(*leaves), leaves, grad, create_graph=True, materialize_grads=True)
    moving = [g for g in grads if g.requires_grad]
    total = sum(((g * s).sum() for g, s in zip(grads, seeds, strict=True) if g.requires_grad), torch.zeros(()))
    return torch.autograd.grad(total, leaves, materialize_grads=True) if moving else grads


def forward_over_reverse(f, tensors, seeds, grad):
    return torch.func.jvp(lambda *t: torch.func.vjp(f, *t)[1](grad), own_memory(*tensors), seeds)[1]


def reverse_over_forward(f, tensors, seeds, grad):
    return torch.func.vjp(lambda *t: torch.func.jvp(f, t, seeds)[1], *own_memory(*tensors))[1](grad)


TRANSFORMS = [call, no_grad, inference, backward, backward, backward_twice, backward_of_some]
TRANSFORMS += [jvp, vjp, linearize, dual_numbers, per_sample, ensemble]
TRANSFORMS += [double_backward, forward_over_reverse, reverse_over_forward]
