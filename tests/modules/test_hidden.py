"""Hidden states against those of the eager network, in value and in derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP

KINDS = ["mlp", "conv"]


def _model(kind: str, depth: int = 70, **settings: Any) -> Any:
    settings = {"scale": 5.0, "dtype": torch.float64, **settings}
    model: Any = DeepNarrowMLP(3, 2, depth, **settings) if kind == "mlp" else DeepNarrowCNN(2, 1, depth, **settings)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p), alpha=0.02)
    return model


def _x(kind: str, batch: int = 4) -> Tensor:
    return torch.rand((batch, 3) if kind == "mlp" else (batch, 2, 4, 3), dtype=torch.float64)


def _eager(seq: nn.Sequential, x: Tensor) -> list[Tensor]:
    """The output of every ReLU."""
    found = []
    for module in seq:
        x = module(x)
        if isinstance(module, nn.ReLU):
            found.append(x)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize(("chunks", "checkpoint"), [(1, "auto"), (3, 7), (1, "none"), (5, (4, 2))])
@pytest.mark.parametrize("layers", [[1], [69], [40, 1, 33, 34, 1], range(1, 70, 2), range(64, 70)])
def test_they_are_those_of_the_eager_network(kind: str, form: Any, chunks: int, checkpoint: Any, layers: Any) -> None:
    model = _model(kind, form=form, chunks=chunks, checkpoint=checkpoint)
    seq, x = model.to_sequential(), _x(kind)
    states = _eager(seq, x)
    with torch.no_grad():
        torch.testing.assert_close(
            model.hidden_states(x, layers), torch.stack([states[i - 1] for i in layers]), rtol=1e-9, atol=1e-9
        )
    leaf = x.clone().requires_grad_()
    got, wanted = model.hidden_states(leaf, layers), torch.stack([_eager(seq, leaf)[i - 1] for i in layers])
    weight = torch.randn_like(wanted)
    (a,) = torch.autograd.grad((got * weight).sum(), leaf, retain_graph=True)
    (b,) = torch.autograd.grad((wanted * weight).sum(), leaf, retain_graph=True)
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    params = [model.first_weight, *model.in_chunks("hidden_weight")]
    first, *hidden = torch.autograd.grad((got * weight).sum(), params, allow_unused=True)
    affine: list[Any] = [m for m in seq if isinstance(m, (nn.Linear, nn.Conv2d))][:-1]
    eager = torch.autograd.grad((wanted * weight).sum(), [m.weight for m in affine], allow_unused=True)
    torch.testing.assert_close(first, eager[0], rtol=1e-8, atol=1e-8)
    joined = torch.cat([torch.zeros_like(p) if g is None else g for p, g in zip(params[1:], hidden, strict=True)])
    for g, e in zip(joined, eager[1:], strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if e is None else e, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_right_in_offset_form(kind: str) -> None:
    model = _model(kind, depth=500, scale=500.0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p * 1e-3).float())
    x = _x(kind).float()
    wanted = torch.stack([_eager(model.to_sequential(), x.double())[i - 1] for i in (1, 33, 499)])
    got = model.float().hidden_states(x, [1, 33, 499])
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=3e-7, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_bit_and_casts_up(kind: str, dtype: torch.dtype) -> None:
    model = _model(kind).float()
    x = _x(kind).to(dtype)
    wanted = model.hidden_states(x.float(), [1, 40])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.hidden_states(x.float(), [1, 40]), wanted)
        assert torch.equal(model.hidden_states(x, [1, 40]), wanted)
        with pytest.raises(TypeError, match="x must be torch.float32 or torch.float64, got torch.int64"):
            model.hidden_states(torch.ones_like(x, dtype=torch.int64), [1])


def test_shapes() -> None:
    mlp, cnn = _model("mlp"), _model("conv")
    x = _x("mlp", 6).reshape(2, 3, 3)
    assert mlp.hidden_states(x, [5, 9]).shape == (2, 2, 3, 6)
    torch.testing.assert_close(mlp.hidden_states(x, [9])[0, 1], mlp.hidden_states(x[1], [9])[0])
    assert mlp.hidden_states(x[0, 0], [1]).shape == (1, 6)
    assert mlp.hidden_states(x, []).shape == (0, 2, 3, 6)
    assert mlp.hidden_states(x[:0], [3]).shape == (1, 0, 3, 6)
    assert cnn.hidden_states(_x("conv"), range(1, 4)).shape == (3, 4, 4, 4, 3)
    assert DeepNarrowMLP(3, 2, 2).hidden_states(torch.rand(5, 3), [1]).shape == (1, 5, 6)


@pytest.mark.parametrize(
    ("x", "layers", "error", "message"),
    [
        (torch.rand(2, 3), [0], ValueError, r"layers\[0\] must be at least 1, got 0"),
        (torch.rand(2, 3), [1, 5], ValueError, r"layers\[1\] must be at most 4, got 5"),
        (torch.rand(2, 3), [-1], ValueError, r"layers\[0\] must be at least 1, got -1"),
        (torch.rand(2, 3), [True], TypeError, r"layers\[0\] must be an int, got True"),
        (torch.rand(2, 3), 3, TypeError, "layers must be a list or range of layer numbers, got 3"),
        (torch.rand(2, 4), [1], ValueError, r"x must have shape \(\*, 3\), got \(2, 4\)"),
        (torch.rand(2, 3).double(), [1], TypeError, "same dtype, got torch.float64 and torch.float32"),
        ([[1.0]], [1], TypeError, "x must be a torch.Tensor, got list"),
    ],
)
def test_bad_arguments(x: Any, layers: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DeepNarrowMLP(3, 2, 5).hidden_states(x, layers)
