"""mlp_chain and conv_chain under every way torch has to differentiate and transform a function."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.functional import conv_chain, mlp_chain
from tests.ops.chains import NAMES, Case, arguments, eager

# torch's own, on the first forward-mode derivative in a process
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

CHAINS = {"mlp": mlp_chain, "cnn": conv_chain}
CASES = [Case(3, 2, 7, 4), Case(1, 2, 6, 4, 3, (3, 2))]
SCALE = 3.0

both_families = pytest.mark.parametrize("case", CASES, ids=["mlp", "cnn"])
both_forms = pytest.mark.parametrize("form", ["offset", "plain"])


def chain(case: Case, *args: Tensor, form: Any = "offset", segment: int = 2) -> Tensor:
    return CHAINS[case.family.name](*args, scale=SCALE, form=form, segment=segment)


def doubles(case: Case, form: str = "offset") -> tuple[Tensor, ...]:
    return arguments(case, torch.float64, form == "offset")


def leaves(case: Case, form: str = "offset") -> tuple[Tensor, ...]:
    return tuple(t.requires_grad_() for t in doubles(case, form))


def eager_gradients(case: Case, args: tuple[Tensor, ...], form: str, weights: Tensor) -> tuple[Tensor, ...]:
    copies = tuple(t.detach().clone().requires_grad_() for t in args)
    return torch.autograd.grad((eager(case.family, copies, SCALE, form == "offset") * weights).sum(), copies)


def assert_all_close(actual: Any, expected: Any) -> None:
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=partial("{}: {}".format, name))


def model_of(case: Case, form: Any = "offset") -> Any:
    """A module of float64, away from its initialisation."""
    kwargs: dict[str, Any] = {"scale": SCALE, "form": form, "dtype": torch.float64, "checkpoint": 2}
    if case.filter:
        model: Any = DeepNarrowCNN(case.inputs, case.outputs, case.depth, kernel_size=case.filter, **kwargs)
    else:
        model = DeepNarrowMLP(case.inputs, case.outputs, case.depth, **kwargs)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.02)
    return model


@both_families
@both_forms
def test_backward_and_grad(case: Case, form: str) -> None:
    args = leaves(case, form)
    out = chain(case, *args, form=form)
    torch.testing.assert_close(out, eager(case.family, args, SCALE, form == "offset"), rtol=1e-11, atol=1e-11)
    weights = torch.randn_like(out)
    wanted = eager_gradients(case, args, form, weights)
    assert_all_close(torch.autograd.grad(out, args, weights, retain_graph=True), wanted)
    (out * weights).sum().backward()
    assert_all_close([t.grad for t in args], wanted)


@both_families
@pytest.mark.parametrize("needed", range(7), ids=NAMES)
def test_each_gradient_alone(case: Case, needed: int) -> None:
    args = tuple(t.requires_grad_(i == needed) for i, t in enumerate(doubles(case)))
    out = chain(case, *args)
    out.sum().backward()
    wanted = eager_gradients(case, args, "offset", torch.ones_like(out))
    for i, t in enumerate(args):
        if i == needed:
            torch.testing.assert_close(t.grad, wanted[i], rtol=1e-9, atol=1e-9)
        else:
            assert t.grad is None


@both_families
@both_forms
def test_gradcheck(case: Case, form: str) -> None:
    def function(*args: Tensor) -> Tensor:
        return chain(case, *args, form=form)

    assert torch.autograd.gradcheck(
        function, leaves(case, form), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )


@both_families
@both_forms
def test_grad_vjp_and_jvp(case: Case, form: str) -> None:
    args = doubles(case, form)
    tangents = tuple(torch.randn_like(t) for t in args)

    def function(*args: Tensor) -> Tensor:
        return chain(case, *args, form=form)

    out, pull, *_ = vjp(function, *args)
    weights = torch.randn_like(out)
    wanted = eager_gradients(case, args, form, weights)
    assert_all_close(pull(weights), wanted)
    assert_all_close(grad(lambda *a: (function(*a) * weights).sum(), argnums=tuple(range(7)))(*args), wanted)
    primal, tangent, *_ = jvp(function, args, tangents)
    assert torch.equal(primal, out)
    _, expected, *_ = jvp(lambda *a: eager(case.family, a, SCALE, form == "offset"), args, tangents)
    torch.testing.assert_close(tangent, expected, rtol=1e-9, atol=1e-9)


@both_families
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians(case: Case, transform: Any) -> None:
    args, every = doubles(case), tuple(range(7))
    got = transform(lambda *a: chain(case, *a), argnums=every)(*args)
    wanted = jacrev(lambda *a: eager(case.family, a, SCALE, True), argnums=every)(*args)
    assert_all_close(got, wanted)


@both_families
def test_per_sample_gradients(case: Case) -> None:
    x, *params = doubles(case)

    def loss(sample: Tensor, *params: Tensor) -> Tensor:
        return chain(case, sample, *params).square().sum()

    every = tuple(range(7))
    got = vmap(grad(loss, argnums=every), in_dims=(0, *[None] * 6))(x, *params)
    single = [grad(loss, argnums=every)(sample, *params) for sample in x]
    assert_all_close(got, [torch.stack(g) for g in zip(*single, strict=True)])


@both_families
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_over_data(case: Case, dim: int) -> None:
    x, *params = doubles(case)
    batches = torch.stack([x, 2 * x, x - 1], dim)
    expected = torch.stack([chain(case, b, *params) for b in batches.unbind(dim)])
    got = vmap(lambda b: chain(case, b, *params), in_dims=dim)(batches)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    tangent = torch.randn_like(batches)
    pushed = vmap(lambda b, t: jvp(lambda b: chain(case, b, *params), (b,), (t,))[1], in_dims=dim)(batches, tangent)
    for i, (b, t) in enumerate(zip(batches.unbind(dim), tangent.unbind(dim), strict=True)):
        want = jvp(lambda b: chain(case, b, *params), (b,), (t,))[1]
        torch.testing.assert_close(pushed[i], want, rtol=1e-12, atol=1e-12)


@both_families
def test_vmap_over_parameters(case: Case) -> None:
    x, *params = doubles(case)
    stacks = [torch.stack([p, p + 0.01, p * 0.9]) for p in params]
    expected = torch.stack([chain(case, x, *(s[i] for s in stacks)) for i in range(3)])
    torch.testing.assert_close(vmap(lambda *p: chain(case, x, *p))(*stacks), expected)
    # Some parameters only, the data beside them, and a nested vmap.
    xs = torch.stack([x, x + 1, x * 2])
    some = vmap(lambda b, w: chain(case, b, *params[:2], w, *params[3:]))(xs, stacks[2])
    for i in range(3):
        torch.testing.assert_close(some[i], chain(case, xs[i], *params[:2], stacks[2][i], *params[3:]))
    nested = vmap(lambda b: vmap(lambda *p: chain(case, b, *p))(*stacks))(xs)
    torch.testing.assert_close(nested[2, 1], chain(case, xs[2], *(s[1] for s in stacks)))
    losses = vmap(grad(lambda *p: chain(case, x, *p).square().sum(), argnums=tuple(range(6))))(*stacks)
    alone = grad(lambda *p: chain(case, x, *p).square().sum(), argnums=tuple(range(6)))(*(s[1] for s in stacks))
    assert_all_close([x, *(g[1] for g in losses)], [x, *alone])


@both_families
def test_vmap_over_nothing(case: Case) -> None:
    """Results of the shapes that eager layers give, with 0 in front."""
    x, *params = doubles(case)
    none, stacks = x[None][:0], [p[None][:0] for p in params]
    outputs = chain(case, x, *params).shape
    assert vmap(lambda b: chain(case, b, *params))(none).shape == (0, *outputs)
    assert vmap(grad(lambda b: chain(case, b, *params).sum()))(none).shape == (0, *x.shape)
    assert vmap(lambda b: jvp(lambda b: chain(case, b, *params), (b,), (b,))[1])(none).shape == (0, *outputs)
    assert vmap(lambda *p: chain(case, x, *p))(*stacks).shape == (0, *outputs)
    losses = vmap(grad(lambda *p: chain(case, x, *p).sum(), argnums=tuple(range(6))))(*stacks)
    assert [g.shape for g in losses] == [(0, *p.shape) for p in params]


@both_families
def test_functional_call_and_ensembles(case: Case) -> None:
    models = [model_of(case) for _ in range(3)]
    params, buffers = stack_module_state(models)
    x = doubles(case)[0]
    out = vmap(lambda p: functional_call(models[0], (p, buffers), (x,)))(params)
    torch.testing.assert_close(out, torch.stack([m(x) for m in models]))
    named = dict(models[1].named_parameters())
    gradients = grad(lambda p: functional_call(models[0], p, (x,)).square().sum())(named)
    models[1](x).square().sum().backward()
    for name, param in named.items():
        torch.testing.assert_close(gradients[name], param.grad)


@both_families
def test_compiles_to_one_graph(case: Case) -> None:
    model, x = model_of(case), doubles(case)[0].requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    compiled(x).square().sum().backward()
    got = [x.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    x.grad = None
    model(x).square().sum().backward()
    assert_all_close(got, [x.grad, *(p.grad for p in model.parameters())])


def test_compiles_models_of_several_scales_and_batches() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda m, x: m(x), fullgraph=True, backend="aot_eager")
    for depth in (40, 50, 60):  # the default scale is the depth
        model = DeepNarrowMLP(3, 2, depth, dtype=torch.float64)
        for batch in (4, 7):
            x = torch.rand(batch, 3, dtype=torch.float64)
            torch.testing.assert_close(compiled(model, x), model(x))
    dynamic = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(dynamic(x), model(x))


def test_exports_with_a_dynamic_batch() -> None:
    model = DeepNarrowMLP(3, 2, 40, dtype=torch.float64)
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (torch.rand(4, 3, dtype=torch.float64),), dynamic_shapes=({0: batch},))
    x = torch.rand(5000, 3, dtype=torch.float64)
    torch.testing.assert_close(program.module()(x), model(x))


@both_families
def test_exports(case: Case) -> None:
    model, x = model_of(case), doubles(case)[0]
    program = torch.export.export(model, (x,))
    torch.testing.assert_close(program.module()(x), model(x))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("narrowdeep" in target for target in targets) == 1, targets


@both_families
@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0)])
def test_leading_dimensions(case: Case, leading: tuple[int, ...]) -> None:
    _, *params = doubles(case)
    x = torch.randn(*leading, case.inputs, *case.image, dtype=torch.float64, requires_grad=True)
    out = chain(case, x, *params)
    assert out.shape == (*leading, case.outputs)
    flat = x.detach().reshape(-1, case.inputs, *case.image)
    torch.testing.assert_close(out.reshape(-1, case.outputs), chain(case, flat, *params))
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.shape == x.shape
    assert gradient.isfinite().all()


@both_families
def test_an_empty_batch_has_zero_gradients(case: Case) -> None:
    x, *params = leaves(case)
    gradients = torch.autograd.grad(chain(case, x[:0], *params).sum(), params)
    assert all(torch.equal(g, torch.zeros_like(p)) for g, p in zip(gradients, params, strict=True))


@both_families
def test_segment_changes_no_bit(case: Case) -> None:
    args = leaves(case)
    wanted = torch.autograd.grad(chain(case, *args, segment=0).sum(), args)
    for segment in (1, 3, 100):
        got = torch.autograd.grad(chain(case, *args, segment=segment).sum(), args)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@both_families
def test_parameters_changed_in_place_before_the_backward_are_noticed(case: Case) -> None:
    args = leaves(case)
    out = chain(case, *args)
    with torch.no_grad():
        args[3].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@both_families
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"scale": float("nan")}, ValueError, "scale must be finite and positive, got nan"),
        ({"scale": float("inf")}, ValueError, "scale must be finite and positive, got inf"),
        ({"scale": -1.0}, ValueError, "scale must be finite and positive, got -1.0"),
        ({"scale": True}, TypeError, "scale must be a number, got True"),
        ({"scale": "3"}, TypeError, "scale must be a number, got '3'"),
        ({"form": "ofset"}, ValueError, "form must be 'offset' or 'plain', got 'ofset'"),
        ({"scale": -(10**5000)}, ValueError, "scale must be finite and positive, got an int of 16610 bits"),
        ({"scale": 10**5000}, ValueError, "scale must be finite and positive, got an int of 16610 bits"),
        ({"segment": -(10**5000)}, ValueError, "segment must be at least 0, got an int of 16610 bits"),
        ({"segment": 10**5000}, ValueError, "segment must be below 2\\*\\*63, got an int of 16610 bits"),
        ({"snapshots": -(10**5000)}, ValueError, "snapshots must be at least 1, got an int of 16610 bits"),
        ({"segment": -1}, ValueError, "segment must be at least 0, got -1"),
        ({"segment": 2.0}, TypeError, "segment must be an int, got 2.0"),
    ],
)
def test_bad_settings(case: Case, settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CHAINS[case.family.name](*doubles(case), **{"scale": SCALE, **settings})


def _meta(t: Tensor) -> Tensor:
    return torch.empty_like(t, device="meta")


@both_families
@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("x", lambda t: t.long(), TypeError, "x must be torch.float32 or torch.float64, got torch.int64"),
        ("x", lambda t: t.half(), TypeError, "x must be torch.float32 or torch.float64, got torch.float16"),
        ("x", lambda t: t.tolist(), TypeError, "x must be a torch.Tensor, got list"),
        ("x", lambda t: t.float(), TypeError, "same dtype, got torch.float32 and torch.float64"),
        ("x", _meta, ValueError, "x and first_weight must be on the same device, got meta and cpu"),
        ("hidden_weight", lambda t: t.float(), TypeError, "x and hidden_weight must have the same dtype"),
        ("last_bias", _meta, ValueError, "x and last_bias must be on the same device, got cpu and meta"),
        ("first_weight", lambda t: t[0], ValueError, r"first_weight must have shape \(n, "),
        ("first_bias", lambda t: t[1:], ValueError, r"first_bias must have shape \("),
        ("hidden_weight", lambda t: t[:, 1:], ValueError, r"hidden_weight must have shape \("),
        ("hidden_bias", lambda t: t[1:], ValueError, r"hidden_bias must have shape \("),
        ("last_weight", lambda t: t[0], ValueError, r"last_weight must have shape \("),
        ("last_bias", lambda t: t[1:], ValueError, r"last_bias must have shape \("),
    ],
)
def test_bad_tensors(case: Case, name: str, change: Any, error: type[Exception], message: str) -> None:
    args: list[Any] = list(doubles(case))
    args[NAMES.index(name)] = change(args[NAMES.index(name)])
    with pytest.raises(error, match=message):
        chain(case, *args)


@pytest.mark.parametrize(
    ("case", "shape", "message"),
    [
        (CASES[0], (4, 5), "x must have 3 features in its last dimension, got 5"),
        (CASES[0], (), "x must have 3 features in its last dimension, got a scalar"),
        (CASES[1], (4, 2, 3, 3), r"x must have shape \(\*, 1, H, W\), got \(4, 2, 3, 3\)"),
        (CASES[1], (3, 3), r"x must have shape \(\*, 1, H, W\), got \(3, 3\)"),
        (CASES[1], (4, 1, 3, 0), "x must have images of at least 1x1 pixels, got 3x0"),
    ],
    ids=str,
)
def test_bad_shapes_of_x(case: Case, shape: tuple[int, ...], message: str) -> None:
    _, *params = doubles(case)
    with pytest.raises(ValueError, match=message):
        chain(case, torch.zeros(shape, dtype=torch.float64), *params)


@both_families
def test_the_offset_form_has_one_width(case: Case) -> None:
    args = doubles(case._replace(hidden=case.width + 1), "plain")
    assert chain(case, *args, form="plain").shape == (case.batch, case.outputs)
    with pytest.raises(ValueError, match=rf" = {case.width} rows in offset form, got {case.width + 1}"):
        chain(case, *args)


def test_filters_are_square_and_odd() -> None:
    args = doubles(CASES[1])
    for cut in ((..., slice(2), slice(2)), (..., slice(1))):
        short = [args[0], *(t[cut] if t.dim() >= 4 else t for t in args[1:])]
        with pytest.raises(ValueError, match="first_weight must have square filters of odd size, got shape"):
            chain(CASES[1], *short)


def test_a_million_layers_are_one_node() -> None:
    """Autograd frees a deep graph by recursion; this one has no depth."""
    model = DeepNarrowMLP(1, 1, 1_000_000)
    assert model.width == 3
    start = time.perf_counter()
    loss = model(torch.rand(1, 1)).sub(1).square().sum()
    loss.backward()
    assert model.hidden_bias.grad is not None
    # The output is 0 and the last unit passes the gradient 2 (0 - 1) on through every layer.
    assert torch.equal(model.hidden_bias.grad[:, 2], torch.full((999_998,), -2.0))
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    assert len(seen) < 20
    del loss, nodes, seen, node
    assert time.perf_counter() - start < 5
