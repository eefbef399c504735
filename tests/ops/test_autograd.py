"""Derivatives of the raw ops: reached with autograd on, by whatever way, an op differentiates rightly or raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
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
THIRD = "narrowdeep differentiates its chains twice"

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


def along(
    function: Callable[..., Tensor], args: tuple[Tensor, ...], weights: Tensor, tangents: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The second derivative of <weights, function> along tangents, by torch's own forward mode over reverse."""
    values = tuple(a.detach() for a in args)
    return jvp(lambda *a: vjp(function, *a)[1](weights), values, tangents)[1]


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
    """Its derivative there is the jvp; with respect to the chain's inputs it is the second derivative."""
    args, ops = doubles(case, offset), case.family.ops.raw
    cotangents = [torch.randn_like(a) for a in args]
    _, saved = ops.forward(*args, *settings(case, offset), 2)

    def backward(weights: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return ops.backward(weights, *tensors, saved, *settings(case, offset), 2, True, True)

    weights = torch.randn(case.batch, case.outputs, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(backward(weights, *args), weights, cotangents)
    assert_close(found, jvp(true(case, offset), args, tuple(cotangents))[1], 1e-10)
    leaves = tuple(a.requires_grad_() for a in args)
    second = torch.autograd.grad(backward(weights, *leaves), leaves, cotangents)
    all_close(second, along(true(case, offset), args, weights.detach(), tuple(cotangents)))


@both_families
@both_forms
def test_the_jvp_op_is_linear_in_the_tangents(case: Case, offset: bool) -> None:
    """Its derivative there is the backward; with respect to the chain's inputs it is the second derivative."""
    args, ops = doubles(case, offset), case.family.ops.raw
    tangents = tuple(torch.randn_like(a).requires_grad_() for a in args)
    weights = torch.randn(case.batch, case.outputs, dtype=torch.float64)
    found = torch.autograd.grad(ops.jvp(*args, *tangents, *settings(case, offset)), tangents, weights)
    all_close(found, gradients(true(case, offset), args, weights))
    expected = along(true(case, offset), args, weights, tuple(t.detach() for t in tangents))
    leaves = tuple(a.requires_grad_() for a in args)
    all_close(torch.autograd.grad(ops.jvp(*leaves, *tangents, *settings(case, offset)), leaves, weights), expected)


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
@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_gradient_penalty(case: Case, cut: str, backend: str | None) -> None:
    """Trained on: the gradients of |df/dx|^2 and of f together."""
    model, x = moved(case, form="plain", **CUTS[cut]), doubles(case)[0]

    def penalised(call: Any) -> Tensor:
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        (first.square().sum() + out.sum()).backward()
        assert leaf.grad is not None
        return leaf.grad

    sequence = model.to_sequential()
    grads = penalised(model if backend is None else torch.compile(model, backend=backend)), penalised(sequence)
    all_close(grads[:1], grads[1:])
    layers = [module for module in sequence if hasattr(module, "weight")]
    for span in model.spans():
        for name in ("weight", "bias"):
            found = getattr(span, name).grad
            wanted = torch.stack([getattr(layers[i], name).grad for i in span.layers])
            assert_close(found, wanted.reshape(found.shape), 1e-10, f"{name} of {span.layers}")


@both_families
def test_aot_autograd_refuses_by_itself(case: Case) -> None:
    model, x = moved(case), doubles(case)[0].requires_grad_()
    (first,) = torch.autograd.grad(torch.compile(model, backend="aot_eager")(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        first.square().sum().backward()

    def penalty(x: Tensor) -> Tensor:  # for x alone: through what AOT keeps of it
        out = model(x).square().sum()
        (first,) = torch.autograd.grad(out, x, create_graph=True)
        return torch.autograd.grad(first.square().sum() + 0 * out, x)[0]

    assert penalty(x).abs().max() > 0
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.compile(penalty, backend="aot_eager")(x)


@both_families
def test_a_compiled_hessian(case: Case) -> None:
    """Without a graph of its own; with one AOT would take a third derivative, and the message says what to do."""
    model, x = moved(case), doubles(case)[0][0]
    sequence = model.to_sequential()

    def second(x: Tensor) -> Tensor:
        return hessian(lambda x: model(x).square().sum())(x)

    compiled = torch.compile(second, backend="aot_eager")
    with torch.no_grad():
        assert_close(compiled(x), hessian(lambda x: sequence(x[None]).square().sum())(x).detach(), 1e-10)
    with pytest.raises(Exception, match=r"take second ones under torch.no_grad\(\)"):
        compiled(x.clone().requires_grad_())


@both_families
def test_compiled_autograd(case: Case) -> None:
    model, x = moved(case), doubles(case)[0]
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    loss = model(x).square().sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        loss.backward()
    all_close([p.grad for p in model.parameters()], expected)


SECONDS: dict[str, Callable[..., Any]] = {
    "hessian": lambda f, x, t: hessian(f)(x),
    "reverse over reverse": lambda f, x, t: jacrev(jacrev(f))(x),
    "reverse over forward": lambda f, x, t: jacrev(jacfwd(f))(x),
    "jvp of grad": lambda f, x, t: jvp(grad(f), (x,), (t,))[1],
    "grad of jvp": lambda f, x, t: grad(lambda x: jvp(f, (x,), (t,))[1])(x),
    "vjp of grad": lambda f, x, t: vjp(grad(f), x)[1](t)[0],
    "autograd.functional.hvp": lambda f, x, t: torch.autograd.functional.hvp(f, x, t)[1],
    "autograd.functional.vhp": lambda f, x, t: torch.autograd.functional.vhp(f, x, t)[1],
    "autograd.functional.hessian": lambda f, x, t: torch.autograd.functional.hessian(f, x),
    "vectorized": lambda f, x, t: torch.autograd.functional.hessian(f, x, vectorize=True),
    "linearize of grad": lambda f, x, t: linearize(grad(f), x)[1](t),
    "traced": lambda f, x, t: make_fx(lambda x: jvp(grad(f), (x,), (t,))[1])(x)(x),
    "compiled": lambda f, x, t: torch.compile(lambda x: vjp(grad(f), x)[1](t)[0], backend="eager")(x),
}


@both_families
@both_forms
@pytest.mark.parametrize("way", SECONDS)
@pytest.mark.parametrize("which", [0, 3, 5], ids=["x", "hidden_weight", "last_weight"])
def test_second_derivatives_by_every_way(case: Case, offset: bool, way: str, which: int) -> None:
    args = doubles(case._replace(depth=4), offset)
    weights, t = torch.randn(case.batch, case.outputs, dtype=torch.float64), torch.randn_like(args[which])

    def of(chain: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda a: (chain(*args[:which], a, *args[which + 1 :]).square() * weights).sum()

    found = SECONDS[way](of(own(case, offset)), args[which], t)
    other = "hessian" if found.dim() > t.dim() else "jvp of grad"
    assert_close(found, SECONDS[other](of(true(case, offset)), args[which], t), 1e-10)


@both_families
@both_forms
def test_second_derivatives_of_every_sample(case: Case, offset: bool) -> None:
    """vmap over data alone, and over parameters as well."""
    x, *params = doubles(case, offset)
    scales = torch.rand(2, dtype=torch.float64)

    def penalty(chain: Callable[..., Tensor], s: Tensor) -> Tensor:
        first = grad(lambda x: chain(x, *(s * p for p in params)).square().sum())
        return grad(lambda x: first(x).square().sum())(x)

    def one(chain: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: chain(x[None], *params).square().sum()

    ways: list[Callable[[Callable[..., Tensor]], Tensor]] = [
        lambda chain: vmap(hessian(one(chain)))(x),
        lambda chain: vmap(lambda x: jvp(grad(one(chain)), (x,), (x,))[1])(x),
        lambda chain: vmap(lambda s: penalty(chain, s))(scales),
    ]
    for way in ways:
        assert_close(way(own(case, offset)), way(true(case, offset)), 1e-10)


@both_families
@both_forms
def test_gradgradcheck(case: Case, offset: bool) -> None:
    leaves = tuple(a.requires_grad_() for a in doubles(case._replace(depth=4, batch=2), offset))
    assert torch.autograd.gradgradcheck(own(case, offset), leaves)


@both_families
@pytest.mark.parametrize("cut", CUTS)
def test_third_derivatives_raise(case: Case, cut: str) -> None:
    model, x = moved(case, **CUTS[cut]), doubles(case)[0].requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=THIRD):
        second.sum().backward()
    with pytest.raises(NotImplementedError, match=THIRD):
        grad(lambda x: hessian(lambda x: model(x).square().sum())(x).square().sum())(x.detach())


@both_families
def test_forward_over_forward_names_the_ways(case: Case) -> None:
    x, *params = doubles(case)
    with pytest.raises(NotImplementedError, match="no forward mode over forward mode: .*torch.func.hessian"):
        jacfwd(jacfwd(lambda x: own(case, True)(x, *params)))(x)


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
@both_forms
def test_second_derivatives_of_hidden_states(case: Case, offset: bool) -> None:
    model, x = moved(case, form="offset" if offset else "plain"), doubles(case)[0]
    sequence, t = model.to_sequential(), torch.randn_like(x)
    layers = [1, 2]

    def ours(x: Tensor) -> Tensor:
        return model.hidden_states(x, layers).pow(3).sum()

    def truth(x: Tensor) -> Tensor:
        states = [x]
        for module in sequence:
            states.append(module(states[-1]))
        return sum((states[2 * layer].pow(3).sum() for layer in layers), torch.zeros(()))

    for way in ("jvp of grad", "vjp of grad", "grad of jvp", "autograd.functional.hvp"):
        assert_close(SECONDS[way](ours, x, t), SECONDS[way](truth, x, t).detach(), 1e-10)
