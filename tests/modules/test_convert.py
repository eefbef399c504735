"""To and from eager layers and the published code's files, without losing digits or taking one network for another."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP

KINDS = ["mlp", "conv"]


def _model(kind: str, depth: int = 300, **settings: Any) -> Any:
    settings = {"scale": 5000.0, "dtype": torch.float64, **settings}
    model: Any = DeepNarrowMLP(3, 2, depth, **settings) if kind == "mlp" else DeepNarrowCNN(1, 2, depth, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=1e-6)
    return model


def _x(kind: str) -> Tensor:
    return torch.rand((4, 3) if kind == "mlp" else (4, 1, 4, 4), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_layers_keep_their_digits_in_a_float32_model(kind: str) -> None:
    exact = _model(kind)
    x = _x(kind).float()
    wanted = exact(x.double())
    size = wanted.abs().max().item()
    seq = exact.to_sequential()
    float32 = _model(kind, dtype=torch.float32)
    float32.load_layers(exact.layers())
    models = [
        float32,
        type(exact).from_sequential(seq, scale=5000.0, dtype=torch.float32),
        type(exact).from_authors(exact.to_authors(), dtype=torch.float32),
    ]
    for model in models:
        assert model.first_weight.dtype == torch.float32
        torch.testing.assert_close(model.hidden_weight.double(), exact.hidden_weight, rtol=1e-7, atol=1e-13)
        assert (model(x) - wanted).abs().max() < 2e-6 * size
    # And out: all that a float32 model holds, which its own dtype cannot add to 1.
    torch.testing.assert_close(float32.to_sequential(dtype=torch.float64)(x.double()), wanted, rtol=0, atol=2e-6 * size)
    again = _model(kind, dtype=torch.float32)
    again.load_layers(float32.layers(dtype=torch.float64))
    for a, b in zip(again.parameters(), float32.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12)
    assert (float32.to_sequential()(x) - wanted).abs().max() > 1e-3 * size


@pytest.mark.parametrize("form", ["offset", "plain"])
def test_layers_are_copies(form: Any) -> None:
    model = DeepNarrowMLP(3, 2, 5, form=form)
    before = copy.deepcopy(model)
    for weight, bias in model.layers():
        weight.zero_()
        bias.zero_()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda a: a[:-1], ValueError, "layers must be 4 pairs of a weight and a bias, got 3"),
        (lambda a: [(a[0][0][:1], a[0][1]), *a[1:]], ValueError, r"layers\[0\] must have a weight of shape \(4, 2\)"),
        (lambda a: [*a[:2], (a[2][0][:1], a[2][1]), a[3]], ValueError, r"layers\[2\] .* \(4, 4\), got \(1, 4\)"),
        (lambda a: [*a[:3], (a[3][0], a[3][1][0])], ValueError, r"layers\[3\] must have a bias of shape \(1,\)"),
        (lambda a: [(a[0][0].int(), a[0][1]), *a[1:]], TypeError, r"layers\[0\] .* floating dtype, got torch.int32"),
        (lambda a: [*a[:3], a[3][0]], TypeError, r"layers\[3\] must be a pair"),
        (lambda a: [*a[:3], (None, None)], TypeError, r"layers\[3\] must have a weight .* got NoneType"),
    ],
)
def test_layers_of_another_network_are_refused_before_anything_is_written(
    change: Any, error: type[Exception], message: str
) -> None:
    model = DeepNarrowMLP(2, 1, 4)
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        model.load_layers(change(DeepNarrowMLP(2, 1, 4).layers()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


class _Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _replaced(seq: nn.Sequential, i: int, module: Any) -> nn.Sequential:
    seq[i] = module
    return seq


def _hooked(seq: nn.Sequential) -> nn.Sequential:
    seq[2].register_forward_hook(lambda module, args, out: 2 * out)
    return seq


def _hooked_weight(seq: nn.Sequential) -> nn.Sequential:
    seq.get_parameter("4.weight").register_hook(torch.zeros_like)
    return seq


def _parametrized(seq: nn.Sequential) -> nn.Sequential:
    parametrizations.weight_norm(seq[0])
    return seq


def _narrowed(seq: nn.Sequential) -> nn.Sequential:
    seq[2].weight = nn.Parameter(torch.rand(1, 4))
    return seq


def _own_forward(seq: nn.Sequential) -> nn.Sequential:
    seq[2].forward = lambda x: 2 * x
    return seq


class _Reversed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return -super().forward(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: _replaced(s, 2, _Doubled(4, 4)), r"seq\[2\] must be nn.Linear itself, got its subclass _Doubled"),
        (_hooked, r"seq\[2\] must be nn.Linear without hooks"),
        (_hooked_weight, r"seq\[4\] must be nn.Linear without hooks, got Linear.* with some on its weight"),
        (_parametrized, r"seq\[0\] must be nn.Linear itself, got its subclass ParametrizedLinear"),
        (_narrowed, r"seq\[2\] must have a weight of shape \(4, 4\), got shape \(1, 4\)"),
        (_own_forward, r"seq\[2\] must be nn.Linear with its own forward"),
        (lambda s: _replaced(s, 4, s[2]), r"one parameter as seq\[2\].weight and seq\[4\].weight"),
        (lambda s: _Reversed(*s), "seq must be nn.Sequential itself, got its subclass _Reversed"),
        (lambda s: list(s), r"seq must be nn.Sequential, got \["),
    ],
)
def test_a_sequential_that_is_not_what_its_parameters_say(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeepNarrowMLP.from_sequential(change(DeepNarrowMLP(2, 1, 5).to_sequential()))


def test_a_flatten_that_is_none_of_the_batch() -> None:
    seq = DeepNarrowCNN(1, 1, 4).to_sequential()
    for flatten in (nn.Flatten(0), nn.Flatten(1, 2)):
        seq[-1] = flatten
        with pytest.raises(ValueError, match=r"must be nn.Flatten\(1, -1\), got Flatten"):
            DeepNarrowCNN.from_sequential(seq)


# ---- the published code, written again from its description: L + 1 affine layers, head, body, tail ----


class _Published(nn.Module):
    def __init__(self, inputs: int, outputs: int, depth: int, images: bool) -> None:
        super().__init__()
        width = inputs + 1 + outputs

        def layer(i: int, o: int) -> nn.Module:
            return nn.Conv2d(i, o, 3, padding=1) if images else nn.Linear(i, o)

        self.head, self.tail = layer(inputs, width), layer(width, outputs)
        self.body = nn.ModuleList(layer(width, width) for _ in range(depth - 1))
        self.images = images
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.avg_pool2d(x, 4) if self.images else x
        for module in (self.head, *self.body):
            h = module(h).relu()
        z = self.tail(h)
        return z.mean((2, 3)) if self.images else z


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["offset", "plain"])
def test_the_files_of_the_published_code_both_ways(kind: str, form: Any) -> None:
    images = kind == "conv"
    ours: Any = DeepNarrowCNN if images else DeepNarrowMLP
    theirs = _Published(1, 2, 7, images)
    with torch.no_grad():
        theirs.tail.bias.sub_(40)  # type: ignore[operator]
    x = torch.rand(3, 1, 8, 12, dtype=torch.float64) if images else torch.rand(3, 1, dtype=torch.float64)
    pooled = nn.functional.avg_pool2d(x, 4) if images else x
    wrapped = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    for state in (theirs.state_dict(), wrapped, {"model_state_dict": wrapped}):
        torch.manual_seed(3)
        model = ours.from_authors(state, form=form)
        assert torch.initial_seed() == 3
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(3).get_state())
        assert (model.depth, model.scale, model.form) == (8, 40.0, form)
        assert model.rho == (1 / 3 if images else 1.0)
        torch.testing.assert_close(model(pooled), theirs(x), rtol=1e-9, atol=1e-9)
    again = _Published(1, 2, 7, images)
    assert str(again.load_state_dict(model.to_authors())) == "<All keys matched successfully>"
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: [], TypeError, "state_dict must be a dict of tensors, got list"),
        (lambda s: {}, ValueError, "state_dict must have one head.weight, got none"),
        (lambda s: s | {"a.head.weight": 0}, ValueError, "state_dict must have one head.weight, got"),
        (lambda s: s | {"extra": 0}, ValueError, "state_dict must have head, body.0, .*, got extra"),
        (lambda s: s | {"tail.bias": 0}, TypeError, "state_dict must hold tensors, got int as tail.bias"),
        (lambda s: {k: v for k, v in s.items() if k != "tail.bias"}, ValueError, "must have tail.bias|body"),
        (lambda s: {k: v for k, v in s.items() if k != "body.1.weight"}, ValueError, "must have"),
        (lambda s: {k.replace("y.1", "y.9"): v for k, v in s.items()}, ValueError, r"must have body.1.weight"),
        (lambda s: s | {"head.weight": torch.rand(5, 1)}, ValueError, "head.weight must have in .* = 4 rows, got 5"),
        (lambda s: s | {"body.1.weight": torch.rand(1, 4)}, ValueError, r"layers\[2\] must have a weight of shape"),
        (lambda s: s | {"tail.bias": torch.zeros(2)}, ValueError, "scale must be given"),
    ],
)
def test_other_files_are_refused(change: Any, error: type[Exception], message: str) -> None:
    state = DeepNarrowMLP(1, 2, 5, dtype=torch.float64).to_authors()
    with pytest.raises(error, match=message):
        DeepNarrowMLP.from_authors(change(state))
    with pytest.raises(ValueError, match=r"head.weight must have shape \(rows, columns, 3, 3\)"):
        DeepNarrowCNN.from_authors(state)


def test_images_that_the_published_code_has_no_network_for() -> None:
    with pytest.raises(ValueError, match="kernel_size must be 3 for the published code"):
        DeepNarrowCNN(1, 1, 4, kernel_size=5).to_authors()
    with pytest.raises(ValueError, match="in_channels must be 1 for the published code, got 2"):
        DeepNarrowCNN(2, 1, 4).to_authors()
