"""The two families of chain ops as data, so that one set of tests serves both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name torch's own documentation uses)

from narrowdeep.ops.chain import ChainOps
from narrowdeep.ops.cnn.op import ops as cnn_ops
from narrowdeep.ops.cnn.reference import cnn_forward
from narrowdeep.ops.mlp.op import ops as mlp_ops
from narrowdeep.ops.mlp.reference import mlp_forward

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
NAMES = ("x", "first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")


class Whole:
    """Ops of whole networks: spans with both ends, which begin at state 0."""

    def __init__(self, ops: Any) -> None:
        self.raw = ops

    def forward(self, x: Tensor, *rest: Any) -> Any:
        *params, scale, offset, segment = rest
        return self.raw.forward(x, *params, scale, offset, params[4].shape[0], 0, segment)

    def backward(self, grad_out: Tensor, x: Tensor, *rest: Any) -> Any:
        *params, saved, scale, offset, segment, need_input, need_params = rest
        settings = (scale, offset, params[4].shape[0], 0, segment)
        return self.raw.backward(grad_out, x, *params, saved, *settings, need_input, need_params)

    def jvp(self, x: Tensor, *rest: Any) -> Any:
        return self.raw.jvp(x, *rest, rest[4].shape[0], 0)

    def backward_jvp(self, grad_out: Tensor, grad_out_t: Tensor | None, x: Tensor, *rest: Any) -> Any:
        *tensors, scale, offset, need_input, need_params = rest
        settings = (scale, offset, tensors[4].shape[0], 0)
        return self.raw.backward_jvp(grad_out, grad_out_t, x, *tensors, *settings, need_input, need_params)


def truths(forward: Callable[..., tuple[Tensor, Tensor]]) -> ChainOps:
    """The ops of a reference: its gradients are autograd's, its tangents ``torch.func.jvp``'s."""

    def backward(grad: Tensor, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        params, settings, need_input, need_params = rest[:6], rest[7:12], *rest[12:]
        leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (input, *params)]
        wanted = [leaf for leaf in leaves if leaf is not None]
        with torch.enable_grad():
            out = forward(*leaves, *settings)[0]
            grads = iter(torch.autograd.grad(out, wanted, grad, materialize_grads=True))
        found = [input.new_empty(0) if leaf is None else next(grads) for leaf in leaves]
        needed = [need_input, *[need_params] * 6]
        return tuple(g if need else input.new_empty(0) for g, need in zip(found, needed, strict=True))

    def jvp(input: Tensor, *rest: Any) -> Tensor:
        primals, tangents, settings = (input, *rest[:6]), rest[6:13], rest[13:]
        moving = [i for i, t in enumerate(tangents) if t is not None]

        def function(*values: Tensor) -> Tensor:
            every = list(primals)
            for i, value in zip(moving, values, strict=True):
                every[i] = value
            return forward(*every, *settings, 0)[0]

        return torch.func.jvp(function, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving))[1]

    def backward_jvp(grad: Tensor, grad_t: Tensor | None, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        inputs, tangents, settings, (need_input, need_params) = (input, *rest[:6]), rest[6:13], rest[13:17], rest[17:]
        present = [i for i, t in enumerate(inputs) if t is not None]

        def gradients(grad: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            def function(*values: Tensor) -> Tensor:
                every: list[Tensor | None] = [None] * 7
                for i, value in zip(present, values, strict=True):
                    every[i] = value
                return forward(*every, *settings, 0)[0]

            return torch.func.vjp(function, *values)[1](grad)

        moving = [(grad, grad_t), *((inputs[i], tangents[i]) for i in present)]
        zeros = [torch.zeros_like(value) if t is None else t for value, t in moving]
        grads = iter(torch.func.jvp(gradients, tuple(value for value, _ in moving), tuple(zeros))[1])
        found = [next(grads) if i in present else input.new_empty(0) for i in range(7)]
        needed = [need_input, *[need_params] * 6]
        return tuple(g if need else input.new_empty(0) for g, need in zip(found, needed, strict=True))

    return ChainOps(forward, backward, jvp, backward_jvp)


@dataclass(frozen=True)
class Family:
    """One family of chain ops, its twin in plain torch, and one of its layers in eager torch."""

    name: str
    ops: Whole
    reference: Whole
    layer: Callable[[Tensor, Tensor, Tensor], Tensor]
    """(x, weight, bias) -> z, batch first."""


def _convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)


MLP = Family("mlp", Whole(mlp_ops), Whole(truths(mlp_forward)), F.linear)
CONV = Family("cnn", Whole(cnn_ops), Whole(truths(cnn_forward)), _convolution)


class Case(NamedTuple):
    """Sizes of one chain; an MLP where there is no filter, a convolution chain where there is one."""

    inputs: int
    outputs: int
    depth: int
    batch: int
    filter: int | None = None
    image: tuple[int, ...] = ()
    hidden: int | None = None  # width of the hidden states; None is in + 1 + out, the only one of the offset form

    def __str__(self) -> str:
        sizes = f"{self.inputs}-{self.width}-{self.outputs} L{self.depth} B{self.batch}"
        return sizes + (f" f{self.filter} {self.image[0]}x{self.image[1]}" if self.filter else "")

    @property
    def family(self) -> Family:
        return CONV if self.filter else MLP

    @property
    def width(self) -> int:
        return self.hidden or self.inputs + 1 + self.outputs

    @property
    def tap(self) -> tuple[int, ...]:
        return (self.filter, self.filter) if self.filter else ()


def arguments(case: Case, dtype: torch.dtype, offset: bool) -> tuple[Tensor, ...]:
    """x and the six parameters, away from initialisation, scaled so that neither states nor gradients explode."""
    n, tap = case.width, case.tap
    std = (0.03 if offset else 1.4) / (n * (case.filter or 1) ** 2) ** 0.5
    tensors = (
        torch.randn(case.batch, case.inputs, *case.image),
        torch.randn(n, case.inputs, *tap),
        torch.randn(n) * 0.1,
        torch.randn(case.depth - 2, n, n, *tap) * std,
        torch.randn(case.depth - 2, n) * 0.1,
        torch.randn(case.outputs, n, *tap),
        torch.randn(case.outputs),
    )
    return tuple(t.to(dtype) for t in tensors)


def double(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    return tuple(None if t is None else t.double() for t in tensors)


def eager(family: Family, args: tuple[Tensor, ...], scale: float, offset: bool) -> Tensor:
    """The same network layer by layer, with W = E + Delta put together here (thesis sections 3.1 and 4.0.1)."""
    h, first, first_bias, hidden, hidden_bias, last, last_bias = args
    if offset:
        inputs, outputs = h.shape[1], last.shape[0]
        right = first.shape[0] - outputs
        centre: tuple[Any, ...] = tuple(size // 2 for size in first.shape[2:])
        first_part, hidden_part, last_part = (torch.zeros_like(w) for w in (first, hidden, last))
        for i in range(inputs):
            one, every = (i, i, *centre), (slice(None), i, i, *centre)
            first_part[one] = scale
            hidden_part[every] = 1
        for i in range(outputs):
            one, every = (i, right + i, *centre), (slice(None), right + i, right + i, *centre)
            last_part[one] = 1
            hidden_part[every] = 1
        base = torch.zeros_like(first_bias)
        base[right:] = scale
        first, hidden, last = first + first_part, hidden + hidden_part, last + last_part
        first_bias, last_bias = first_bias + base, last_bias - scale
    h = torch.relu(family.layer(h, first, first_bias))
    for weight, bias in zip(hidden, hidden_bias, strict=True):
        h = torch.relu(family.layer(h, weight, bias))
    z = family.layer(h, last, last_bias)
    return z.flatten(2).mean(2) if z.dim() > 2 else z


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Relative to the largest entry: an entry is a sum of terms of that size."""
    assert actual.shape == expected.shape, name
    size = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual.double(),
        expected.double(),
        rtol=0,
        atol=tolerance * max(size, 1e-30),
        msg=lambda text: f"{name}: {text}",
    )


class Truth(NamedTuple):
    """What a case's ops must give, from the reference in float64."""

    args: tuple[Tensor, ...]
    grad_out: Tensor
    tangents: tuple[tuple[Tensor | None, ...], ...]  # of all arguments, and of some
    out: Tensor
    states: Tensor
    grads: tuple[Tensor, ...]
    jvps: tuple[Tensor, ...]
    grad_out_t: Tensor
    second: tuple[tuple[Tensor, ...], ...]  # tangents of the gradients, along each of ``tangents``


@cache  # every build of the engine is held against the same truth
def truth(case: Case, dtype: torch.dtype, offset: bool, scale: float) -> Truth:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        args = arguments(case, dtype, offset)
        grad_out = torch.randn(case.batch, case.outputs, dtype=dtype)
        every = tuple(torch.randn_like(t) for t in args)
    some = tuple(t if i in (1, 2, 4, 5) else None for i, t in enumerate(every))
    reference = case.family.reference
    out, states = reference.forward(*double(args), scale, offset, 1)
    grads = reference.backward(grad_out.double(), *double(args), states, scale, offset, 1, True, True)
    jvps = tuple(reference.jvp(*double(args), *double(t), scale, offset) for t in (every, some))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        grad_out_t = torch.randn_like(grad_out)
    second = tuple(
        reference.backward_jvp(*double((grad_out, gt, *args, *t)), scale, offset, True, True)
        for gt, t in ((grad_out_t, every), (None, some))
    )
    return Truth(args, grad_out, (every, some), out, states, grads, jvps, grad_out_t, second)
