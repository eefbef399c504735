"""Empirical kernels and Jacobians against torch.autograd on the eager network, and against the limits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import (
    empirical,
    empirical_ntk,
    jacobian,
    limit_ntk_cnn,
    limit_ntk_mlp,
    max_learning_rate,
    ntk_vector_product,
)

# torch.func.jvp of torch 2.15 imports a module that scripts functions.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")

Narrow = DeepNarrowMLP | DeepNarrowCNN


def perturbed(model: Narrow, size: float) -> Narrow:
    """Away from initialisation, where nothing is zero or one any more."""
    with torch.no_grad():
        for param in model.parameters():
            param.add_(size * torch.randn_like(param))
    return model


def explicit_jacobian(module: nn.Module, x: Tensor) -> Tensor:
    """(N, out, P): one backward an output and sample."""
    rows = []
    for sample in x:
        out = module(sample[None])[0]
        for i in range(len(out)):
            grads = torch.autograd.grad(out[i], tuple(module.parameters()), retain_graph=True)
            rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows).unflatten(0, (len(x), -1))


def assert_near(got: Tensor, expected: Tensor, relative: float) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= relative * expected.abs().max()


MLPS = [(2, 1, 2), (2, 1, 3), (1, 2, 17), (3, 2, 129), (10, 6, 5)]
CNNS = [(1, 1, 2, 3, (3, 3)), (2, 3, 5, 3, (2, 4)), (1, 2, 4, 5, (3, 1)), (3, 1, 3, 1, (2, 2))]


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize(("d_in", "d_out", "depth"), MLPS)
def test_mlp_kernel_is_the_product_of_explicit_jacobians(form, d_in: int, d_out: int, depth: int) -> None:
    torch.manual_seed(0)
    model = perturbed(DeepNarrowMLP(d_in, d_out, depth, form=form, dtype=torch.float64), 0.3 / depth)
    check_against_explicit(model, torch.randn(5, d_in, dtype=torch.float64), torch.rand(3, d_in, dtype=torch.float64))


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize(("c", "k", "depth", "size", "image"), CNNS)
def test_cnn_kernel_is_the_product_of_explicit_jacobians(form, c: int, k: int, depth: int, size: int, image) -> None:
    torch.manual_seed(1)
    model = DeepNarrowCNN(c, k, depth, kernel_size=size, form=form, dtype=torch.float64)
    perturbed(model, 0.1 / depth)
    check_against_explicit(
        model, torch.randn(3, c, *image, dtype=torch.float64), torch.rand(2, c, *image, dtype=torch.float64)
    )


def check_against_explicit(model: Narrow, x1: Tensor, x2: Tensor) -> None:
    eager = model.to_sequential()
    j1, j2 = explicit_jacobian(eager, x1), explicit_jacobian(eager, x2)
    for right, x in ((j2, x2), (j1, None)):
        expected = torch.einsum("iap,jbp->ijab", j1, right)
        assert_near(empirical_ntk(model, x1, x, scaled=False), expected, 1e-12)
        assert_near(empirical_ntk(model, x1, x), expected / (model.depth * model.scale**2), 1e-12)
        diagonal = expected.diagonal(dim1=2, dim2=3)
        assert_near(empirical_ntk(model, x1, x, scaled=False, reduce="diagonal"), diagonal, 1e-12)
        assert_near(empirical_ntk(model, x1, x, scaled=False, reduce="trace"), diagonal.sum(-1), 1e-12)
    full = empirical_ntk(model, x1)
    assert torch.equal(full, full.permute(1, 0, 3, 2))
    parts = jacobian(model, x1)
    first, hidden, last = ("first_weight", "first_bias"), ("hidden_weight", "hidden_bias"), ("last_weight", "last_bias")
    layers = [[parts[name].flatten(2) for name in first]]
    layers += [[parts[name][:, :, j].flatten(2) for name in hidden] for j in range(model.depth - 2)]
    layers += [[parts[name].flatten(2) for name in last]]
    assert_near(torch.cat([part for layer in layers for part in layer], -1), j1, 1e-12)
    for name, param in model.named_parameters():
        assert parts[name].shape == (*j1.shape[:2], *param.shape)
    v = torch.randn(j2.shape[:2], dtype=x1.dtype)
    expected = torch.einsum("iap,jbp,jb->ia", j1, j2, v)
    assert_near(ntk_vector_product(model, x1, x2, v, scaled=False), expected, 1e-12)
    assert_near(ntk_vector_product(model, x1, x2, v), expected * model.ntk_lr, 1e-12)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_float32_offset_form_is_accurate(kind: str) -> None:
    """Trained away from the initialisation by steps far below an ulp of 1."""
    torch.manual_seed(2)
    x = torch.rand(5, 3) if kind == "mlp" else torch.rand(3, 1, 4, 3)
    model = DeepNarrowMLP(3, 2, 500, scale=5000.0) if kind == "mlp" else DeepNarrowCNN(1, 2, 60, scale=600.0)
    perturbed(model, 0.1 / (model.depth * model.scale))
    exact = empirical_ntk(copy.deepcopy(model).double(), x.double())
    assert_near(empirical_ntk(model, x), exact, 1e-5)
    assert_near(ntk_vector_product(model, x, x, torch.ones(len(x), 2)).double(), exact.sum((1, 3)), 1e-5)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 40), st.integers(1, 6), st.integers(0, 10**6))
def test_kernel_is_positive_semidefinite(d_in: int, d_out: int, depth: int, samples: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = perturbed(DeepNarrowMLP(d_in, d_out, depth, dtype=torch.float64), 0.1 / depth)
    kernel = empirical_ntk(model, torch.randn(samples, d_in, dtype=torch.float64))
    values = torch.linalg.eigvalsh(kernel.permute(0, 2, 1, 3).reshape(samples * d_out, -1))
    assert values[0] > -1e-12 * values[-1]


def convergence_errors(make, x: Tensor, limit: Tensor, depth: int, draws: int) -> tuple[Tensor, Tensor]:
    """Mean over initialisations of (kernel - (L-1)/L (limit + 1/C_L^2)), and the standard error of that mean."""
    identity = torch.eye(make(2).last_weight.shape[0], dtype=torch.float64)
    deviations = []
    for seed in range(draws):
        torch.manual_seed(seed)
        model = make(depth)
        expected = (depth - 1) / depth * (limit + 1 / model.scale**2)
        deviations.append(empirical_ntk(model, x) - expected[:, :, None, None] * identity)
    stacked = torch.stack(deviations)
    return stacked.mean(0), stacked.std(0) / math.sqrt(draws)


@pytest.mark.parametrize("outputs", [1, 2])
def test_mlp_kernel_converges_to_the_limit(outputs: int) -> None:
    """Within three standard errors of the finite-size mean, which fall as 1/sqrt(L)."""
    x = torch.rand(4, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 0.1
    limit = limit_ntk_mlp(x, out_features=outputs)

    def make(depth: int) -> DeepNarrowMLP:
        return DeepNarrowMLP(2, outputs, depth, scale=1e4, dtype=torch.float64)

    spread = []
    for depth in (100, 1000, 10000):
        mean, error = convergence_errors(make, x, limit, depth, draws=30)
        assert (mean.abs() <= 3 * error + 1e-6).all()
        spread.append(error.square().mean().sqrt().item())
    assert spread[0] / spread[1] == pytest.approx(math.sqrt(10), rel=0.4)
    assert spread[1] / spread[2] == pytest.approx(math.sqrt(10), rel=0.4)


@pytest.mark.parametrize(("c", "k"), [(1, 1), (2, 3)])
def test_cnn_kernel_converges_to_the_limit(c: int, k: int) -> None:
    x = torch.rand(2, c, 2, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 0.1
    limit = limit_ntk_cnn(x, rho=0.5, out_channels=k)

    def make(depth: int) -> DeepNarrowCNN:
        return DeepNarrowCNN(c, k, depth, rho=0.5, scale=1e4, dtype=torch.float64)

    spread = []
    for depth in (100, 1000):
        mean, error = convergence_errors(make, x, limit, depth, draws=20)
        assert (mean.abs() <= 3 * error + 1e-6).all()
        spread.append(error.square().mean().sqrt().item())
    assert spread[0] / spread[1] == pytest.approx(math.sqrt(10), rel=0.5)


def test_descent_follows_the_kernel_of_its_own_start() -> None:
    """At C_L = 1e9 the kernel stays put, and descent is the linear recurrence of the initial NTK (Theorem 3.2).

    The last two points are not trained on: their outputs move by the kernel alone.
    """
    torch.manual_seed(7)
    angle = torch.linspace(0.2, 1.3, 8, dtype=torch.float64)
    points, count = torch.stack((angle.cos(), angle.sin()), 1), 6
    x, y = points[:count], points[:count].prod(1, keepdim=True)
    model = DeepNarrowMLP(2, 1, 1000, scale=1e9, dtype=torch.float64)
    kernel = empirical_ntk(model, points, x)[:, :, 0, 0]
    tau, steps = 0.4 * max_learning_rate(kernel[:count]), 20
    optimizer = torch.optim.SGD(model.parameters(), lr=tau * model.ntk_lr)
    predicted = torch.zeros(len(points), 1, dtype=torch.float64)
    for _ in range(steps):
        optimizer.zero_grad()
        ((model(x) - y).square().sum() / (2 * count)).backward()
        optimizer.step()
        predicted -= tau / count * kernel @ (predicted[:count] - y)
    assert (model(points) - predicted).abs().max() < 1e-8
    assert predicted.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_frozen_parameters_are_left_out(kind: str) -> None:
    torch.manual_seed(8)
    x = torch.rand(3, 2, dtype=torch.float64) if kind == "mlp" else torch.rand(3, 2, 2, 2, dtype=torch.float64)
    names = ("first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")
    kind_of = {"mlp": DeepNarrowMLP, "cnn": DeepNarrowCNN}
    model = perturbed(kind_of[kind](2, 2, 5, dtype=torch.float64), 0.05)
    whole = jacobian(model, x)
    for frozen in [*({name} for name in names), {"first_weight", "hidden_bias"}, set(names)]:
        for name in names:
            getattr(model, name).requires_grad_(name not in frozen)
        kept = [whole[name].flatten(2) for name in names if name not in frozen]
        zero = torch.zeros(3, 3, 2, 2, dtype=torch.float64)
        expected = sum((torch.einsum("iap,jbp->ijab", j, j) for j in kept), zero)
        torch.testing.assert_close(empirical_ntk(model, x, scaled=False), expected, rtol=1e-12, atol=1e-12)
        v = torch.randn(3, 2, dtype=torch.float64)
        product = ntk_vector_product(model, x, x, v, scaled=False)
        torch.testing.assert_close(product, torch.einsum("ijab,jb->ia", expected, v), rtol=1e-11, atol=1e-11)
        assert set(jacobian(model, x)) == set(names) - frozen


@pytest.mark.parametrize("reduce", ["full", "trace", "diagonal"])
@pytest.mark.parametrize("size", [1, 2])
def test_blocks_change_nothing(size: int, reduce, monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = perturbed(DeepNarrowMLP(2, 3, 9, dtype=torch.float64), 0.1)
    cnn = perturbed(DeepNarrowCNN(1, 2, 6, dtype=torch.float64), 0.05)
    pairs: list[tuple[Narrow, Tensor]] = [(mlp, torch.rand(5, 2).double()), (cnn, torch.rand(5, 1, 3, 2).double())]
    for model, x in pairs:
        calls = ((x, None), (x, x[:3]), (x[:2], x), (x[:0], x), (x, x[:0]))
        whole = [empirical_ntk(model, *call, reduce=reduce) for call in calls]
        with monkeypatch.context() as patch:
            patch.setattr("narrowdeep.ntk.empirical._samples_at_once", lambda *_: 2 * size)
            for call, expected in zip(calls, whole, strict=True):
                torch.testing.assert_close(empirical_ntk(model, *call, reduce=reduce), expected, rtol=1e-13, atol=1e-13)


def test_large_sets_go_block_by_block() -> None:
    """The narrower the network and the smaller its images, the more samples fit."""
    assert empirical._samples_at_once(DeepNarrowMLP(2, 1, 1000), torch.empty(0, 2)) > 10_000
    assert 2 <= empirical._samples_at_once(DeepNarrowCNN(1, 10, 1000), torch.empty(0, 1, 28, 28)) < 100
    assert empirical._samples_at_once(DeepNarrowMLP(784, 10, 10), torch.empty(0, 784)) < 1000


@pytest.mark.parametrize("reduce", ["full", "trace", "diagonal"])
def test_empty_sets_give_empty_kernels(reduce) -> None:
    for model, x in (
        (DeepNarrowMLP(2, 3, 4), torch.rand(5, 2)),
        (DeepNarrowCNN(1, 3, 4), torch.rand(5, 1, 2, 2)),
        (nn.Sequential(nn.Flatten(), nn.Linear(2, 3)), torch.rand(5, 2)),
    ):
        end = {"full": (3, 3), "trace": (), "diagonal": (3,)}[reduce]
        assert empirical_ntk(model, x[:0], x, reduce=reduce).shape == (0, 5, *end)
        assert empirical_ntk(model, x, x[:0], reduce=reduce).shape == (5, 0, *end)
        assert empirical_ntk(model, x[:0], reduce=reduce).shape == (0, 0, *end)
        assert empirical_ntk(model, x[:0], reduce=reduce).dtype == torch.float64
        for name, param in model.named_parameters():
            assert jacobian(model, x[:0])[name].shape == (0, 3, *param.shape)
        assert torch.equal(ntk_vector_product(model, x, x[:0], torch.zeros(0, 3)), torch.zeros(5, 3))
        assert ntk_vector_product(model, x[:0], x, torch.zeros(5, 3)).shape == (0, 3)


class Pooled(nn.Module):
    """One output without its dimension, a buffer, a frozen parameter, and a narrow model inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = DeepNarrowMLP(2, 2, 5, dtype=torch.float64)
        self.gain = nn.Parameter(torch.tensor([0.5, 2.0], dtype=torch.float64))
        self.frozen = nn.Parameter(torch.tensor(3.0, dtype=torch.float64), requires_grad=False)
        self.register_buffer("shift", torch.tensor(1.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen * (self.inner(x) * self.gain).sum(-1) + self.shift


@pytest.mark.parametrize("chunk", [1 << 27, 1])
def test_other_modules_go_through_torch_func(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowdeep.ntk.empirical._CHUNK_BYTES", chunk)
    torch.manual_seed(9)
    modules: list[tuple[nn.Module, int]] = [
        (nn.Sequential(nn.Linear(2, 7), nn.Tanh(), nn.Linear(7, 3)).double(), 3),
        (Pooled(), 1),
    ]
    for module, outputs in modules:
        x, y = torch.rand(4, 2, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        rows = []
        for sample in torch.cat((x, y)):
            out = module(sample[None]).reshape(-1)
            grads = [torch.autograd.grad(o, list(trained.values()), retain_graph=True) for o in out]
            rows.append(torch.stack([torch.cat([g.flatten() for g in grad]) for grad in grads]))
        j = torch.stack(rows)
        expected = torch.einsum("iap,jbp->ijab", j[:4], j[4:])
        torch.testing.assert_close(empirical_ntk(module, x, y), expected, rtol=1e-12, atol=1e-12)
        square = empirical_ntk(module, x)
        torch.testing.assert_close(square, torch.einsum("iap,jbp->ijab", j[:4], j[:4]), rtol=1e-12, atol=1e-12)
        diagonal = expected.diagonal(dim1=2, dim2=3)
        torch.testing.assert_close(empirical_ntk(module, x, y, reduce="diagonal"), diagonal, rtol=1e-12, atol=1e-12)
        trace = empirical_ntk(module, x, y, reduce="trace")
        torch.testing.assert_close(trace, diagonal.sum(-1), rtol=1e-12, atol=1e-12)
        parts = jacobian(module, x)
        assert set(parts) == set(trained)
        torch.testing.assert_close(torch.cat([parts[name].flatten(2) for name in trained], -1), j[:4])
        v = torch.randn(3, outputs, dtype=torch.float64)
        product = ntk_vector_product(module, x, y, v)
        torch.testing.assert_close(product, torch.einsum("ijab,jb->ia", expected, v), rtol=1e-11, atol=1e-11)


def test_symmetric_fallback_computes_half_the_jacobians(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 samples one by one: 10 pairs in place of 4 + 16, and calls to learn the outputs' shape."""
    monkeypatch.setattr("narrowdeep.ntk.empirical._CHUNK_BYTES", 1)
    module, x = nn.Linear(2, 3), torch.rand(4, 2)
    calls: list[torch.Size] = []
    module.register_forward_hook(lambda *_: calls.append(x.shape))
    square = empirical_ntk(module, x)
    assert len(calls) == 10 + 1 + 1 + 4
    calls.clear()
    torch.testing.assert_close(square, empirical_ntk(module, x, x.clone()), rtol=0, atol=0)
    assert len(calls) == 4 + 16 + 1 + 1 + 4
    assert not empirical_ntk(module.requires_grad_(False), x).any()


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_base() -> None:
    class Doubled(DeepNarrowMLP):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    torch.manual_seed(10)
    plain = perturbed(DeepNarrowMLP(2, 2, 4, dtype=torch.float64), 0.1)
    doubled = Doubled(2, 2, 4, dtype=torch.float64)
    doubled.load_state_dict(plain.state_dict())
    x = torch.rand(3, 2, dtype=torch.float64)
    torch.testing.assert_close(
        empirical_ntk(doubled, x, scaled=False), 4 * empirical_ntk(plain, x, scaled=False), rtol=1e-12, atol=0
    )


def test_op_is_registered_correctly() -> None:
    torch.manual_seed(11)
    mlp, cnn = DeepNarrowMLP(2, 2, 5, dtype=torch.float64), DeepNarrowCNN(1, 2, 4, dtype=torch.float64)
    images = torch.rand(3, 1, 2, 3, dtype=torch.float64)
    for model, x, gram in (
        (mlp, torch.rand(3, 2, dtype=torch.float64), torch.ops.narrowdeep.mlp_gram.default),
        (cnn, images, torch.ops.narrowdeep.cnn_gram.default),
    ):
        params = [p.detach() for p in model.stacked()]
        for symmetric in (False, True):
            for reduce in range(3):
                arguments = (x, x if symmetric else x[:2], *params, model.scale, True, symmetric, 0b111111, reduce)
                torch.library.opcheck(gram, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m, x: empirical_ntk(m, x, x[:, :1]), ValueError, r"x2 must have shape \(N, 2\), got \(5, 1\)"),
        (lambda m, x: empirical_ntk(m, x[0]), ValueError, r"x1 must have shape \(N, 2\), got \(2,\)"),
        (lambda m, x: empirical_ntk(m, x.double()), TypeError, "x1 and first_weight must have the same dtype"),
        (lambda m, x: empirical_ntk(m, x, x.double()), TypeError, "x2 and first_weight must have the same dtype"),
        (lambda m, x: empirical_ntk(m, x, x.half()), TypeError, "x2 must be torch.float32 or torch.float64"),
        (lambda m, x: empirical_ntk(nn.Linear(2, 3), x, x.double()), TypeError, "x1 and x2 must have the same dtype"),
        (lambda m, x: empirical_ntk(None, x), TypeError, "model must be a torch.nn.Module, got NoneType"),  # type: ignore[arg-type]
        (lambda m, x: empirical_ntk(m, x, reduce=["full"]), TypeError, "reduce must be a str, got list"),  # type: ignore[arg-type]
        (lambda m, x: ntk_vector_product(m, x, None, x), TypeError, "x2 must be a torch.Tensor, got NoneType"),  # type: ignore[arg-type]
        (lambda m, x: empirical_ntk(m, x.tolist()), TypeError, "x1 must be a torch.Tensor, got list"),
        (lambda m, x: empirical_ntk(m, x.to_sparse()), TypeError, "x1 must be a dense tensor, got torch.sparse_coo"),
        (lambda m, x: jacobian(m, x.to_sparse()), TypeError, "x must be a dense tensor, got torch.sparse_coo"),
        (lambda m, x: ntk_vector_product(m, x, x, x.to_sparse()), TypeError, "v must be a dense tensor"),
        (lambda m, x: empirical_ntk(m, x, reduce="mean"), ValueError, "reduce must be .*got 'mean'"),  # type: ignore[arg-type]
        (lambda m, x: jacobian(m, x[:, :1]), ValueError, r"x must have shape \(N, 2\)"),
        (lambda m, x: ntk_vector_product(m, x, x, x[:, :1]), ValueError, r"v must have shape \(5, 3\).*got \(5, 1\)"),
        (lambda m, x: ntk_vector_product(m, x, x, torch.ones(5, 3).double()), TypeError, "v must have the dtype"),
        (lambda m, x: empirical_ntk(nn.Linear(2, 3), x, x[:, :1]), ValueError, r"same shape .*\(5, 2\) and \(5, 1\)"),
        (lambda m, x: empirical_ntk(nn.Unflatten(1, (1, 2)), x), ValueError, r"must map \(N, ...\) to \(N, out\)"),
        (lambda m, x: empirical_ntk(DeepNarrowCNN(1, 1, 3), x), ValueError, r"x1 must have shape \(N, 1, H, W\)"),
    ],
)
def test_bad_input(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(DeepNarrowMLP(2, 3, 4), torch.rand(5, 2))


@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_a_narrow_model_are_refused(kind: str) -> None:
    model, x = DeepNarrowMLP(2, 1, 4), torch.rand(3, 2)
    handle = getattr(model, f"register_{kind}_hook")(lambda *_: None)
    for call in (
        lambda: empirical_ntk(model, x),
        lambda: jacobian(model, x),
        lambda: ntk_vector_product(model, x, x, torch.ones(3, 1)),
    ):
        with pytest.raises(ValueError, match="model must have no hooks"):
            call()
    handle.remove()
    assert empirical_ntk(model, x).shape == (3, 3, 1, 1)


def test_a_parameter_without_dimensions() -> None:
    """f = a^2 x: df/da = 2 a x."""

    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(3.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.a.square() * x

    x = torch.tensor([[1.0], [2.0]])
    kernel = 36 * torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    assert torch.equal(empirical_ntk(Square(), x)[:, :, 0, 0], kernel.double())
    assert torch.equal(ntk_vector_product(Square(), x, x, torch.ones(2, 1)), kernel.sum(1, keepdim=True))
