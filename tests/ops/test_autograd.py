"""Derivatives of the raw ops: reached with autograd on, by whatever way, an op differentiates rightly or raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp, linearize, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.functional import conv_chain, mlp_chain
from narrowdeep.ops.gram import op as gram
from tests.ops.chains import Case, arguments, assert_close, eager

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning"),
    # torch's own: of a compiled function that looks at .grad, and of linearize
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),
]

CASES = [Case(3, 2, 7, 4), Case(1, 2, 6, 4, 3, (3, 2))]
SCALE = 3.0
SECOND = "narrowdeep differentiates its chains once"

both_families = pytest.mark.parametrize("case", CASES, ids=["mlp", "cnn"])
both_forms = pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def doubles(case: Case, offset: bool = True) -> tuple[Tensor, ...]:
    return arguments(case, torch.float64, offset)


def own(case: Case, offset: bool) -> Callable[..., Tensor]:
    chain = conv_chain if case.filter else mlp_chain
    return lambda *args: chain(*args, scale=SCALE, form="offset" if offset else "plain", segment=2)


def true(case: Case, offset: bool) -> Callable[..., Tensor]:
    return lambda *args: eager(case.family, args, SCALE, offset)


def all_close(actual: Any, expected: Any) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_close(a, b, 1e-10, f"result {i}")


def gradients(function: Callable[..., Tensor], args: tuple[Tensor, ...], weights: Tensor) -> tuple[Tensor, ...]:
    leaves = tuple(a.detach().requires_grad_() for a in args)
    return torch.autograd.grad(function(*leaves), leaves, weights)


# ---- the ops themselves ----


def settings(case: Case, offset: bool) -> tuple[Any, ...]:
    return SCALE, offset, case.outputs, 0


@both_families
@both_forms
def test_the_forward_op_has_gradients(case: Case, offset: bool) -> None:
    args, weights = doubles(case, offset), torch.randn(case.batch, case.outputs, dtype=torch.float64)
    ops = case.family.ops.raw
    found = gradients(lambda *a: ops.forward(*a, *settings(case, offset), 2)[0], args, weights)
    all_close(found, gradients(true(case, offset), args, weights))


@both_families
@both_forms
def test_the_backward_op_is_linear_in_grad_out(case: Case, offset: bool) -> None:
    """Its derivative there is the jvp; with respect to the chain's inputs it has none."""
    args, ops = doubles(case, offset), case.family.ops.raw
    cotangents = [torch.randn_like(a) for a in args]
    _, saved = ops.forward(*args, *settings(case, offset), 2)

    def backward(weights: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return ops.backward(weights, *tensors, saved, *settings(case, offset), 2, True, True)

    weights = torch.randn(case.batch, case.outputs, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(backward(weights, *args), weights, cotangents)
    assert_close(found, jvp(true(case, offset), args, tuple(cotangents))[1], 1e-10)
    leaves = tuple(a.requires_grad_() for a in args)
    with pytest.raises(NotImplementedError, match=SECOND):
        torch.autograd.grad(backward(weights, *leaves), leaves, cotangents)


@both_families
@both_forms
def test_the_jvp_op_is_linear_in_the_tangents(case: Case, offset: bool) -> None:
    """Its derivative there is the backward; with respect to the chain's inputs it has none."""
    args, ops = doubles(case, offset), case.family.ops.raw
    tangents = tuple(torch.randn_like(a).requires_grad_() for a in args)
    weights = torch.randn(case.batch, case.outputs, dtype=torch.float64)
    found = torch.autograd.grad(ops.jvp(*args, *tangents, *settings(case, offset)), tangents, weights)
    all_close(found, gradients(true(case, offset), args, weights))
    leaves = tuple(a.requires_grad_() for a in args)
    with pytest.raises(NotImplementedError, match=SECOND):
        torch.autograd.grad(ops.jvp(*leaves, *tangents, *settings(case, offset)), leaves, weights)


@both_families
def test_the_gram_op_has_no_derivative(case: Case) -> None:
    x, *params = doubles(case)
    op: Any = gram.cnn_gram if case.filter else gram.mlp_gram
    kernel = op(x.requires_grad_(), x, *params, SCALE, True, True, 63, 0)
    with pytest.raises(NotImplementedError, match="has no derivative"):
        kernel.sum().backward()


# ---- graphs and linear maps made of a chain ----


@both_families
@both_forms
def test_traced_graphs_differentiate(case: Case, offset: bool) -> None:
    args, weights = doubles(case, offset), torch.randn(case.batch, case.outputs, dtype=torch.float64)
    expected = gradients(true(case, offset), args, weights)
    traced = make_fx(own(case, offset))(*args)
    all_close(gradients(traced, args, weights), expected)
    x, *params = args

    def loss(x: Tensor) -> Tensor:
        return (own(case, offset)(x, *params) * weights).sum()

    all_close([make_fx(grad(loss))(x)(x)], expected[:1])


@both_families
@both_forms
def test_linearize_is_the_jvp(case: Case, offset: bool) -> None:
    args, weights = doubles(case, offset), torch.randn(case.batch, case.outputs, dtype=torch.float64)
    tangents = tuple(torch.randn_like(a) for a in args)
    expected = jvp(true(case, offset), args, tangents)
    out, push = linearize(own(case, offset), *args)
    all_close((out, push(*tangents)), expected)
    leaves = tuple(t.requires_grad_() for t in tangents)
    all_close(torch.autograd.grad(push(*leaves), leaves, weights), gradients(true(case, offset), args, weights))


@both_families
@both_forms
def test_a_jvp_differentiates_in_its_tangents(case: Case, offset: bool) -> None:
    """As Gauss-Newton products do, and ``torch.autograd.functional.jvp``."""
    x, *params = doubles(case, offset)
    weights, t = torch.randn(case.batch, case.outputs, dtype=torch.float64), torch.randn_like(x)

    def of(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, *params)

    ours, truth = of(own(case, offset)), of(true(case, offset))

    def product(f: Callable[[Tensor], Tensor]) -> Tensor:
        tangent = jvp(f, (x,), (t,))[1]
        return vjp(f, x)[1](tangent * weights.square())[0]

    assert_close(product(ours), product(truth), 1e-10)
    for f in (
        lambda f: grad(lambda t: (jvp(f, (x,), (t,))[1] * weights).sum())(t),
        lambda f: vjp(lambda t: jvp(f, (x,), (t,))[1], t)[1](weights)[0],
        lambda f: torch.autograd.functional.jvp(f, x, t)[1],
        lambda f: torch.autograd.functional.vjp(f, x, weights)[1],
    ):
        assert_close(f(ours), f(truth), 1e-10)


# ---- second derivatives ----

CUTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "chunks": {"chunks": 2},
    "schedule": {"checkpoint": (2, 1)},
    "both": {"chunks": 2, "checkpoint": (1, 1)},
}


def moved(case: Case, **options: Any) -> Any:
    """A model of float64 away from its initialisation."""
    options = {"scale": SCALE, "dtype": torch.float64, **options}
    if case.filter:
        model: Any = DeepNarrowCNN(case.inputs, case.outputs, case.depth, kernel_size=case.filter, **options)
    else:
        model = DeepNarrowMLP(case.inputs, case.outputs, case.depth, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


@both_families
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
def test_a_gradient_penalty_raises(case: Case, cut: str, backend: str | None) -> None:
    model, x = moved(case, **CUTS[cut]), doubles(case)[0].requires_grad_()
    call = model if backend is None else torch.compile(model, backend=backend)
    (first,) = torch.autograd.grad(call(x).square().sum(), x, create_graph=True)
    refusals = f"{SECOND}|does not currently support double backward"  # torch's own, of aot_eager
    with pytest.raises((NotImplementedError, RuntimeError), match=refusals):
        first.square().sum().backward()


# ---- transforms inside a compiled function ----


@both_families
@both_forms
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_transforms_inside_a_compiled_function(case: Case, offset: bool, backend: str) -> None:
    x, *params = doubles(case, offset)
    weights = torch.randn(case.outputs, dtype=torch.float64)

    def per_sample(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return vmap(grad(lambda x: (function(x[None], *params)[0] * weights).sum()))

    def whole(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return grad(lambda x: (function(x, *params) * weights).sum())

    for transform in (per_sample, whole):
        compiled = torch.compile(transform(own(case, offset)), backend=backend, fullgraph=True)
        assert_close(compiled(x), transform(true(case, offset))(x), 1e-10)


# ---- hidden states ----


@both_families
@both_forms
@pytest.mark.parametrize("chunks", [1, 2])
def test_hidden_states_under_transforms(case: Case, offset: bool, chunks: int) -> None:
    model, layers = moved(case, chunks=chunks, form="offset" if offset else "plain"), [1, 3, case.depth - 1]
    x = doubles(case)[0]
    tangent, sequence = torch.randn_like(x), model.to_sequential()

    def ours(x: Tensor) -> Tensor:
        return model.hidden_states(x, layers)

    def truth(x: Tensor) -> Tensor:
        states = [x]
        for module in sequence:
            states.append(module(states[-1]))
        return torch.stack([states[2 * layer] for layer in layers])

    weights = torch.randn_like(truth(x))
    for f in (
        lambda h: grad(lambda x: (h(x) * weights).sum())(x),
        lambda h: vmap(grad(lambda x, w: (h(x[None])[:, 0] * w).sum()), (0, 1))(x, weights),
        lambda h: jvp(h, (x,), (tangent,))[1],
        lambda h: linearize(h, x)[1](tangent),
        lambda h: make_fx(h)(x)(x),
        lambda h: torch.compile(h, backend="aot_eager", fullgraph=True)(x),
    ):
        assert_close(f(ours).detach(), f(truth).detach(), 1e-10)


@both_families
def test_hidden_states_train_parameters_compiled_or_not(case: Case) -> None:
    model, x = moved(case), doubles(case)[0]

    def loss(x: Tensor) -> Tensor:
        return functional_call(model, {}, (x,)).sum() + model.hidden_states(x, [2]).square().sum()

    expected = torch.autograd.grad(loss(x), list(model.parameters()))
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(x), list(model.parameters()))
    all_close(found, expected)
    state = torch.stack(expected[2:3]).abs().amax((1, 2, 3))
    assert (state[:2] > 0).all()


@both_families
def test_hidden_states_have_no_second_derivatives(case: Case) -> None:
    model, x = moved(case), doubles(case)[0].requires_grad_()
    (first,) = torch.autograd.grad(model.hidden_states(x, [2]).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=SECOND):
        first.sum().backward()
