"""What is computed for models that are not simply narrow ones, and that reading a model leaves no trace in it.

Truth is a double loop of torch.autograd.grad over samples and outputs, written here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import (
    empirical_ntk,
    jacobian,
    kernel_drift,
    layer_contributions,
    layer_deviation,
    ntk_vector_product,
    zero_crossings,
)

# torch.func.jvp of torch 2.15 imports a module that scripts functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

Narrow = DeepNarrowMLP | DeepNarrowCNN


def moved(model: Any, size: float = 0.05) -> Any:
    with torch.no_grad():
        for param in model.parameters():
            param.add_(size * torch.randn_like(param))
    return model


def loop_jacobian(module: nn.Module, x: Tensor, function: Callable[[Tensor], Tensor] | None = None) -> dict:
    """Parameter name -> (N, out, *shape) of the parameters that exist and are trained."""
    named = {name: param for name, param in module.named_parameters() if param.requires_grad}
    rows = []
    for sample in x:
        out = (function or module)(sample[None]).reshape(-1)
        rows.append(
            [torch.autograd.grad(o, list(named.values()), retain_graph=True, materialize_grads=True) for o in out]
        )
    return {name: torch.stack([torch.stack([g[i] for g in row]) for row in rows]) for i, name in enumerate(named)}


def product(left: dict, right: dict) -> Tensor:
    return sum(torch.einsum("iap,jbp->ijab", left[n].flatten(2), right[n].flatten(2)) for n in left)  # type: ignore


def check(module: nn.Module, x: Tensor, y: Tensor, truth: Callable[[Tensor], Tensor] | None = None) -> None:
    """Every function of the package against the loop."""
    left, right = loop_jacobian(module, x, truth), loop_jacobian(module, y, truth)
    kernel, size = product(left, right), product(left, right).abs().max().item()
    tolerance: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12 * size}
    torch.testing.assert_close(empirical_ntk(module, x, y, scaled=False), kernel, **tolerance)
    torch.testing.assert_close(empirical_ntk(module, x, scaled=False), product(left, left), rtol=1e-12, atol=1e-12)
    trace = kernel.diagonal(dim1=2, dim2=3).sum(-1)
    torch.testing.assert_close(empirical_ntk(module, x, y, scaled=False, reduce="trace"), trace, **tolerance)
    got = jacobian(module, x)
    assert list(got) == list(left)
    for name, value in left.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-11 * max(1.0, value.abs().max().item()))
    v = torch.randn(kernel.shape[1], kernel.shape[3], dtype=x.dtype)
    expected = torch.einsum("ijab,jb->ia", kernel, v)
    torch.testing.assert_close(ntk_vector_product(module, x, y, v, scaled=False), expected, rtol=1e-10, atol=1e-10)


def chunked(kind: str, form="offset") -> tuple[Narrow, Tensor, Tensor]:
    torch.manual_seed(0)
    if kind == "mlp":
        model: Narrow = DeepNarrowMLP(2, 2, 8, chunks=2, form=form, dtype=torch.float64)
        return moved(model), torch.randn(3, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64)
    model = DeepNarrowCNN(1, 2, 6, chunks=2, form=form, dtype=torch.float64)
    return moved(model), torch.randn(3, 1, 3, 2, dtype=torch.float64), torch.rand(2, 1, 3, 2, dtype=torch.float64)


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_chunked_models(kind: str, form) -> None:
    model, x, y = chunked(kind, form)
    check(model, x, y)
    torch.testing.assert_close(empirical_ntk(model, x, y), empirical_ntk(model, x, y, scaled=False) * model.ntk_lr)
    torch.testing.assert_close(layer_contributions(model, x, y).sum(0), empirical_ntk(model, x, y, reduce="trace"))
    other = moved(copy.deepcopy(model), 1e-3)
    assert kernel_drift(model, other, x) > 0
    assert zero_crossings(model, other, x).shape == (model.depth - 1,)
    assert layer_deviation(model, other, x) > 0


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_chunks_that_are_frozen_alone_are_left_out(kind: str) -> None:
    model, x, y = chunked(kind)
    model.hidden_weight[0].requires_grad_(False)
    model.hidden_bias[1].requires_grad_(False)
    check(model, x, y)
    parts = layer_contributions(model, x, y)
    torch.testing.assert_close(parts.sum(0), empirical_ntk(model, x, y, reduce="trace"))


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_chunks_that_share_a_parameter_are_one_parameter(kind: str) -> None:
    model, x, y = chunked(kind)
    model.hidden_weight[1] = model.hidden_weight[0]
    check(model, x, y)
    with pytest.raises(ValueError, match="parameters of its own in every layer"):
        layer_contributions(model, x)


@pytest.mark.parametrize("chunks", [1, 2])
def test_extra_parameters_have_the_derivative_zero(chunks: int) -> None:
    torch.manual_seed(1)
    model = moved(DeepNarrowMLP(2, 1, 6, chunks=chunks, dtype=torch.float64))
    model.extra = nn.Parameter(torch.ones(3, 2))
    x, y = torch.rand(3, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64)
    check(model, x, y)
    assert not jacobian(model, x)["extra"].any()


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("chunks", [1, 2])
def test_parametrized_models_are_those_of_the_parameters_below(chunks: int) -> None:
    torch.manual_seed(2)
    model = moved(DeepNarrowMLP(2, 2, 6, chunks=chunks, dtype=torch.float64))
    parametrize.register_parametrization(model, "last_bias", Twice())
    x, y = torch.rand(3, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64)
    check(model, x, y)
    assert "parametrizations.last_bias.original" in jacobian(model, x)
    torch.testing.assert_close(empirical_ntk(model, x), empirical_ntk(model, x, scaled=False) * model.ntk_lr)
    with pytest.raises(TypeError, match="as it is, not parametrized"):
        layer_contributions(model, x)


def test_a_chunked_model_inside_another_module() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(2, 2), DeepNarrowMLP(2, 2, 6, chunks=2), nn.Linear(2, 1)).double()
    check(net, torch.rand(3, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64))


def test_a_layer_that_is_used_twice() -> None:
    """It stays a parameter, and its kernel is that of the sum of both uses."""
    torch.manual_seed(4)
    shared = nn.Linear(3, 3)
    net = nn.Sequential(nn.Linear(2, 3), shared, nn.Tanh(), shared, nn.Linear(3, 2)).double()
    before = dict(net.named_parameters(remove_duplicate=False))
    check(net, torch.rand(3, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64))
    after = dict(net.named_parameters(remove_duplicate=False))
    assert all(after[name] is param and isinstance(param, nn.Parameter) for name, param in before.items())
    assert after.keys() == before.keys()


class Tied(nn.Module):
    """Two modules share a weight, and a third uses it transposed through an attribute of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.again = self.a
        self.register_parameter("own", self.a.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh()) @ self.a.weight.t() + self.again(x) + self.own


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",)])
def test_parameters_that_several_modules_share(frozen: tuple[str, ...]) -> None:
    torch.manual_seed(5)
    net = Tied().double()
    for name in frozen:
        getattr(net.a, name).requires_grad_(False)
    check(net, torch.rand(4, 3, dtype=torch.float64), torch.rand(2, 3, dtype=torch.float64))
    assert net.b.weight is net.a.weight
    assert net.own is net.a.bias


# --- No trace ---------------------------------------------------------------------------------------------------------


def fingerprint(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {"random": torch.get_rng_state().tolist()}
    for path, part in model.named_modules():
        found[f"{path}:attributes"] = {name: id(value) for name, value in vars(part).items()}
        for kind in ("_parameters", "_buffers", "_modules"):
            for name, value in getattr(part, kind).items():
                found[f"{path}:{kind}:{name}"] = id(value)
                if isinstance(value, Tensor):
                    grad = None if value.grad is None else value.grad.tolist()
                    found[f"{path}:{name}"] = (value.tolist(), value.requires_grad, grad, value.is_leaf)
    return found


def calls(model: nn.Module, x: Tensor, outputs: int) -> list[Callable[[], Any]]:
    found: list[Callable[[], Any]] = [
        lambda: empirical_ntk(model, x),
        lambda: empirical_ntk(model, x, x[:2], reduce="trace"),
        lambda: jacobian(model, x),
        lambda: ntk_vector_product(model, x, x, torch.ones(len(x), outputs, dtype=x.dtype)),
        lambda: kernel_drift(model, model, x),
    ]
    if isinstance(model, Narrow):
        found += [
            lambda: layer_contributions(model, x),
            lambda: zero_crossings(model, model, x),
            lambda: layer_deviation(model, model, x),
        ]
    return found


class Counting(nn.Module):
    """Changes its attributes, a buffer, its input and its mode at every call."""

    calls: Any

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.calls += 1
        self.last = x
        self.calls = self.calls + 1
        self.eval()
        return self.inner(x.mul_(2))


def traced() -> Iterator[tuple[str, nn.Module, Tensor, int]]:
    torch.manual_seed(6)
    x = torch.rand(3, 2)
    shared = nn.Linear(2, 2)
    yield "narrow", moved(DeepNarrowMLP(2, 1, 5)), x, 1
    yield "chunked", moved(DeepNarrowMLP(2, 1, 6, chunks=2)), x, 1
    yield "used twice", nn.Sequential(shared, nn.Tanh(), shared), x, 2
    yield "tied", Tied(), torch.rand(3, 3), 3
    yield "batch norm", nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval(), x, 2
    yield "counting", Counting(), x, 2
    pruned = nn.Linear(2, 2)
    prune.l1_unstructured(pruned, "weight", amount=1)
    yield "pruned", nn.Sequential(pruned), x, 2
    yield "pooled", nn.Sequential(nn.ReLU(inplace=True), DeepNarrowMLP(2, 1, 5)), x - 0.5, 1
    frozen = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
    yield "frozen", frozen, x, 2


@pytest.mark.parametrize("name", [case[0] for case in traced()])
def test_reading_leaves_no_trace(name: str) -> None:
    _, model, x, outputs = next(case for case in traced() if case[0] == name)
    for param in model.parameters():
        param.grad = torch.full_like(param, 0.25) if param.requires_grad else None
    samples, before = x.clone(), fingerprint(model)
    for call in calls(model, x, outputs):
        call()
        assert fingerprint(model) == before
        assert torch.equal(x, samples)


class Failing(nn.Module):
    """Raises after it has changed itself."""

    count: Any

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.again = self.inner
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        self.note = x
        torch.rand(1)
        raise RuntimeError("as it wants")


def test_an_exception_leaves_no_trace() -> None:
    model, x = Failing(), torch.rand(3, 2)
    before = fingerprint(model)
    for call in calls(model, x, 2):
        with pytest.raises(RuntimeError, match="as it wants"):
            call()
        assert fingerprint(model) == before


def test_random_and_batch_dependent_modules_are_refused() -> None:
    x = torch.rand(3, 2)
    norm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    dropout = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    noisy = nn.Sequential(nn.Dropout(0.5), DeepNarrowMLP(2, 1, 4))
    scaled = nn.Sequential(nn.BatchNorm1d(2, affine=False), DeepNarrowMLP(2, 1, 4))
    for model, outputs, message in (
        (norm, 2, "each sample on its own, but 1, a BatchNorm1d, takes statistics over the batch"),
        (dropout, 2, "draws random numbers: call model.eval()"),
        (noisy, 1, "draws random numbers: call model.eval()"),
        (scaled, 1, "each sample on its own, but 0, a BatchNorm1d, takes statistics over the batch"),
    ):
        before = fingerprint(model)
        for call in calls(model, x, outputs):
            with pytest.raises(ValueError, match=message):
                call()
            assert fingerprint(model) == before
        for call in calls(model.eval(), x, outputs):
            call()
        model.train()


# --- Global modes -----------------------------------------------------------------------------------------------------


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def matmul_precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(value)
    try:
        yield
        assert torch.get_float32_matmul_precision() == value
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "matmul": lambda: matmul_precision("medium"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "deterministic": deterministic,
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["mlp", "cnn", "chunks", "other", "pooled"])
def test_global_modes_change_nothing(mode: str, kind: str) -> None:
    torch.manual_seed(7)
    x = torch.rand(3, 2) if kind in ("mlp", "chunks", "other") else torch.rand(3, 1, 4, 4)
    model: nn.Module = {
        "mlp": lambda: moved(DeepNarrowMLP(2, 2, 9)),
        "chunks": lambda: moved(DeepNarrowMLP(2, 2, 9, chunks=3)),
        "cnn": lambda: moved(DeepNarrowCNN(1, 2, 5)),
        "other": lambda: nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)),
        "pooled": lambda: nn.Sequential(nn.AvgPool2d(2), moved(DeepNarrowCNN(1, 2, 5))),
    }[kind]()
    expected = [call() for call in calls(model, x, 2)]
    v, copied = torch.ones(3, 2), copy.deepcopy(model)
    with MODES[mode]():
        got = [empirical_ntk(model, x), empirical_ntk(model, x, x[:2], reduce="trace"), jacobian(model, x)]
        got += [ntk_vector_product(model, x, x, v), kernel_drift(copied, model, x)]
        if isinstance(model, Narrow):
            initial: Any = copied
            got += [layer_contributions(model, x), zero_crossings(initial, model, x)]
            got.append(layer_deviation(initial, model, x))
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_models_and_samples_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model, x = DeepNarrowMLP(2, 2, 6, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
        other = nn.Linear(2, 2).double()
    for module in (model, other):
        assert next(module.parameters()).is_inference()
        twin = copy.deepcopy(module)
        for name, param in list(twin.named_parameters()):
            owner, _, own = name.rpartition(".")
            setattr(twin.get_submodule(owner), own, nn.Parameter(param.clone()))
        for got, expected in zip(calls(module, x, 2), calls(twin, x.clone(), 2), strict=True):
            torch.testing.assert_close(got(), expected(), rtol=0, atol=0)


# --- The instance, not its class --------------------------------------------------------------------------------------


def test_a_replaced_forward_is_what_is_differentiated() -> None:
    """The output is 3 times as large, the kernel 9 times."""
    torch.manual_seed(8)
    for model, x in (
        (moved(DeepNarrowMLP(2, 2, 5, dtype=torch.float64)), torch.rand(3, 2, dtype=torch.float64)),
        (moved(DeepNarrowCNN(1, 2, 4, dtype=torch.float64)), torch.rand(3, 1, 2, 3, dtype=torch.float64)),
    ):
        plain, plain_jacobian = empirical_ntk(model, x), jacobian(model, x)
        forward = model.forward
        model.forward = lambda x, forward=forward: 3 * forward(x)
        torch.testing.assert_close(empirical_ntk(model, x), 9 * plain, rtol=1e-12, atol=0)
        check(model, x, x[:2])
        for name, value in jacobian(model, x).items():
            torch.testing.assert_close(value, 3 * plain_jacobian[name], rtol=1e-11, atol=1e-11)
        with pytest.raises(TypeError, match="as it is"):
            layer_contributions(model, x)
        del model.forward
        torch.testing.assert_close(empirical_ntk(model, x), plain, rtol=0, atol=0)


def test_a_subclass_that_uses_other_parameters() -> None:
    class Halved(DeepNarrowMLP):
        def arguments(self) -> tuple[Any, ...]:
            first, *rest = super().arguments()
            return (first / 2, *rest)

    model = moved(Halved(2, 2, 5, dtype=torch.float64))
    check(model, torch.rand(3, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64))


def test_hooks_on_every_module_are_run() -> None:
    model, x = moved(DeepNarrowMLP(2, 1, 5, dtype=torch.float64)), torch.rand(3, 2, dtype=torch.float64)
    plain = empirical_ntk(model, x)
    handle = nn.modules.module.register_module_forward_hook(lambda _m, _i, out: 2 * out)
    try:
        torch.testing.assert_close(empirical_ntk(model, x), 4 * plain, rtol=1e-12, atol=0)
    finally:
        handle.remove()


def test_a_model_with_hooks_behind_another_module_goes_through_torch_func() -> None:
    model, x = moved(DeepNarrowMLP(2, 1, 5, dtype=torch.float64)), torch.rand(3, 2, dtype=torch.float64)
    plain = empirical_ntk(model, x)
    model.register_forward_hook(lambda _m, _i, out: 2 * out)
    torch.testing.assert_close(empirical_ntk(nn.Sequential(model), x), 4 * plain, rtol=1e-12, atol=0)
    outer = nn.Sequential(nn.Identity(), moved(DeepNarrowMLP(2, 1, 5, dtype=torch.float64)))
    inner = empirical_ntk(outer, x)
    outer[0].register_forward_hook(lambda _m, _i, out: out / 2)
    torch.testing.assert_close(empirical_ntk(outer, x), empirical_ntk(outer[1], x / 2), rtol=1e-12, atol=0)
    assert not torch.allclose(empirical_ntk(outer, x), inner)


def pooled(train: bool = True) -> tuple[nn.Sequential, DeepNarrowCNN, Tensor]:
    torch.manual_seed(9)
    cnn = moved(DeepNarrowCNN(1, 2, 5, scale=1e3, dtype=torch.float64))
    return nn.Sequential(nn.AvgPool2d(4), cnn), cnn, torch.rand(3, 1, 8, 12, dtype=torch.float64)


def test_a_narrow_model_behind_modules_without_parameters_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    net, cnn, x = pooled()
    y = x[:2] + 0.1
    check(net, x, y)
    small, other = nn.functional.avg_pool2d(x, 4), nn.functional.avg_pool2d(y, 4)
    for scaled in (True, None):
        torch.testing.assert_close(empirical_ntk(net, x, y, scaled=scaled), empirical_ntk(cnn, small, other))
        v = torch.ones(2, 2, dtype=torch.float64)
        torch.testing.assert_close(
            ntk_vector_product(net, x, y, v, scaled=scaled), ntk_vector_product(cnn, small, other, v)
        )
    torch.testing.assert_close(layer_contributions(net, x, y), layer_contributions(cnn, small, other))  # type: ignore
    assert list(jacobian(net, x)) == [f"1.{name}" for name in jacobian(cnn, small)]
    nested = nn.Sequential(nn.Identity(), nn.Sequential(nn.AvgPool2d(2), nn.Sequential(nn.AvgPool2d(2), cnn)))
    torch.testing.assert_close(empirical_ntk(nested, x), empirical_ntk(cnn, small))
    torch.testing.assert_close(kernel_drift(net, copy.deepcopy(net), x), 0.0)
    # None of it goes through torch.func.
    monkeypatch.setattr(torch.func, "functional_call", lambda m, *a, **k: m(a[1][0]) if m is not net else 1 / 0)
    empirical_ntk(net, x)


def test_modules_before_it_must_work_sample_by_sample() -> None:
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    net, x = nn.Sequential(Centred(), DeepNarrowMLP(2, 1, 4)), torch.rand(3, 2)
    with pytest.raises(ValueError, match="map each sample on its own, but the modules before the network"):
        empirical_ntk(net, x)
    flat = nn.Sequential(nn.Flatten(0), nn.Unflatten(0, (-1, 2)), DeepNarrowMLP(2, 1, 4))
    with pytest.raises(ValueError, match=r"must map \(N, ...\) to .* its first modules \(3, 4\) -> \(6, 2\)"):
        empirical_ntk(flat, torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"x1 after the modules before the network must have shape \(N, 2\)"):
        empirical_ntk(nn.Sequential(nn.Flatten(), DeepNarrowMLP(2, 1, 4)), torch.rand(3, 3, 1))


def test_scaled_is_refused_where_there_is_no_scale() -> None:
    torch.manual_seed(10)
    x, v = torch.rand(3, 2), torch.ones(3, 2)
    narrow = DeepNarrowMLP(2, 2, 4)
    for net in (
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), narrow),
        nn.Sequential(narrow, nn.Tanh()),
        nn.Sequential(narrow, nn.Identity()),
    ):
        with pytest.raises(ValueError, match="scaled must be False or left out for a module that is not a DeepNarrow"):
            empirical_ntk(net, x, scaled=True)
        with pytest.raises(ValueError, match="scaled must be False or left out"):
            ntk_vector_product(net, x, x, v, scaled=True)
        torch.testing.assert_close(empirical_ntk(net, x), empirical_ntk(net, x, scaled=False))
    with pytest.raises(TypeError, match="scaled must be True, False or None, got 'yes'"):
        empirical_ntk(narrow, x, scaled="yes")  # type: ignore[arg-type]


def test_compiled_models_are_the_models() -> None:
    torch.manual_seed(11)
    x = torch.rand(3, 2, dtype=torch.float64)
    narrow = moved(DeepNarrowMLP(2, 2, 5, dtype=torch.float64))
    other = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    for model in (narrow, other):
        expected = empirical_ntk(model, x)
        wrapped: Any = torch.compile(model, backend="eager")
        torch.testing.assert_close(empirical_ntk(wrapped, x), expected)
        assert list(jacobian(wrapped, x)) == [name for name, _ in wrapped.named_parameters()]
        product = ntk_vector_product(wrapped, x, x, torch.ones(3, 2, dtype=torch.float64))
        torch.testing.assert_close(product, expected.sum((1, 3)))
        inside = copy.deepcopy(model)
        inside.compile(backend="eager")
        torch.testing.assert_close(empirical_ntk(inside, x), expected)
        outer = nn.Sequential(inside, nn.Identity())
        torch.testing.assert_close(empirical_ntk(outer, x), empirical_ntk(model, x, scaled=False))


def test_other_wrappers() -> None:
    torch.manual_seed(12)
    narrow, x = moved(DeepNarrowMLP(2, 2, 5, dtype=torch.float64)), torch.rand(3, 2, dtype=torch.float64)
    for wrapped in (nn.DataParallel(narrow), torch.optim.swa_utils.AveragedModel(narrow)):
        torch.testing.assert_close(empirical_ntk(wrapped, x, scaled=True), empirical_ntk(narrow, x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: empirical_ntk(nn.LazyLinear(2), x), ValueError, "model must be initialised, .* got an unin"),
        (lambda x: empirical_ntk(nn.Linear(2, 2, dtype=torch.complex64), x + 0j), TypeError, "real floating-point"),
        (lambda x: empirical_ntk(nn.Linear(2, 2, device="meta"), x), ValueError, "x1 and model must be on the same"),
        (lambda x: empirical_ntk(nn.RNN(2, 2), x), TypeError, "model must return a torch.Tensor, got tuple"),
        (lambda x: jacobian(nn.Linear(2, 2), 3), TypeError, "x must be a torch.Tensor, got int"),  # type: ignore[arg-type]
        (lambda x: kernel_drift(nn.Linear(2, 2), 3, x), TypeError, "model must be a torch.nn.Module, got int"),  # type: ignore[arg-type]
        (
            lambda x: kernel_drift(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2).requires_grad_(False), x),
            ValueError,
            "initial must have a kernel that is not 0",
        ),
        (
            lambda x: layer_deviation(DeepNarrowMLP(2, 1, 4), DeepNarrowMLP(2, 1, 4), x, power=1.5),  # type: ignore[arg-type]
            TypeError,
            "power must be an int, got 1.5",
        ),
    ],
)
def test_bad_input(call: Callable[[Tensor], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.rand(3, 2))
