"""Chains in chunks: the same as in one op, with each chunk's gradient complete before the next is begun."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.functional import mlp_chain
from narrowdeep.ntk import empirical_ntk
from narrowdeep.optim import FusedSGD
from narrowdeep.training import load_model, save_model

KINDS = ["mlp", "cnn"]


def _model(kind: str, chunks: int, **settings: Any) -> DeepNarrowMLP | DeepNarrowCNN:
    settings = {"depth": 90, "scale": 5.0, "chunks": chunks, "dtype": torch.float64, **settings}
    return DeepNarrowMLP(3, 2, **settings) if kind == "mlp" else DeepNarrowCNN(2, 1, **settings)


def _pair(kind: str, chunks: int = 5, **settings: Any) -> tuple[Any, Any]:
    """The same network in one chunk and in several, away from its initialisation."""
    one, several = _model(kind, 1, **settings), _model(kind, chunks, **settings)
    with torch.no_grad():
        for p in one.parameters():
            p.add_(0.02 * torch.randn_like(p))
    several.load_layers(one.layers())
    return one, several


def _x(kind: str) -> Tensor:
    shape = (11, 3) if kind == "mlp" else (5, 2, 4, 3)
    return torch.rand(shape, dtype=torch.float64, requires_grad=True)


def _joined(model: Any, grads: list[Tensor]) -> list[Tensor]:
    """Gradients of the model's parameters, by name, as those of the six stacked ones."""
    by_name = dict(zip((name for name, _ in model.named_parameters()), grads, strict=True))
    stacked = ("first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")
    return [torch.cat([g for name, g in by_name.items() if name.split(".")[0] == each]) for each in stacked]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("checkpoint", ["auto", "none", 7])
def test_outputs_and_gradients_are_those_of_one_op(kind: str, form: str, checkpoint: Any) -> None:
    one, several = _pair(kind, form=form, checkpoint=checkpoint)
    assert [p.shape[0] for p in several.hidden_weight] == [17, 18, 17, 18, 18]
    x = _x(kind)
    out = one(x)
    weight = torch.randn_like(out)
    wanted = torch.autograd.grad((out * weight).sum(), [x, *one.parameters()])
    got = torch.autograd.grad((several(x) * weight).sum(), [x, *several.parameters()])
    torch.testing.assert_close(several(x), out, rtol=1e-11, atol=1e-11)
    joined = [(grads[0], *_joined(model, list(grads[1:]))) for model, grads in ((several, got), (one, wanted))]
    for a, b in zip(*joined, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * b.abs().max().item())
    with torch.no_grad():
        torch.testing.assert_close(several(x), out, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_keeps_the_accuracy_of_the_offset_form(kind: str) -> None:
    one, several = _pair(kind, chunks=9, depth=2000, scale=2000.0, dtype=torch.float32)
    with torch.no_grad():
        for name in ("first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias"):
            value = getattr(one, name).mul_(0.01)
            chunks = several.in_chunks(name)
            for chunk, part in zip(chunks, value.split([p.shape[0] for p in chunks]), strict=True):
                chunk.copy_(part)
    x = _x(kind).detach().float()
    grads = []
    for model in (one, several, copy.deepcopy(one).double()):
        inputs = x.to(next(model.parameters()).dtype)
        grads.append(_joined(model, list(torch.autograd.grad(model(inputs).sum(), list(model.parameters())))))
    for exact, a, b in zip(grads[2], grads[0], grads[1], strict=True):
        size = exact.norm()
        assert (b - exact).norm() < 3 * (a - exact).norm() + 1e-6 * size


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_chunk_are_used_before_the_next_is_begun(kind: str) -> None:
    _, model = _pair(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x = _x(kind).detach()
    grads = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    seen: list[tuple[str, int]] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(
            lambda _, name=name: seen.append((name, sum(q.grad is not None for q in model.parameters())))
        )
    optimizer = FusedSGD(model, lr=0.125)
    model(x).square().sum().backward()
    assert [name for name, _ in seen if name.startswith("hidden_weight")] == [
        f"hidden_weight.{i}" for i in (4, 3, 2, 1, 0)
    ]
    assert max(count for _, count in seen) <= 2  # a weight's and its bias's
    for (name, p), grad in zip(model.named_parameters(), grads, strict=True):
        torch.testing.assert_close(p.detach(), before[name] - 0.125 * grad, rtol=1e-12, atol=0)
    del optimizer


def test_parameters_that_are_frozen_get_no_gradient() -> None:
    _, model = _pair("mlp")
    for name, p in model.named_parameters():
        p.requires_grad_(name in ("hidden_weight.2", "last_bias"))
    model(_x("mlp").detach()).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {"hidden_weight.2", "last_bias"}


@pytest.mark.parametrize("kind", KINDS)
def test_what_else_a_model_does(kind: str, tmp_path: Path) -> None:
    one, several = _pair(kind)
    x = _x(kind).detach()
    torch.testing.assert_close(empirical_ntk(several, x), empirical_ntk(one, x), rtol=1e-9, atol=0)
    save_model(several, tmp_path / "model.safetensors")
    loaded = load_model(tmp_path / "model.safetensors")
    assert loaded.chunks == 5
    assert torch.equal(loaded(x), several(x))
    assert "chunks=5" in repr(several)
    torch.testing.assert_close(several.to_sequential()(x), several(x), rtol=1e-6, atol=1e-6)
    fresh = _model(kind, 5)
    assert fresh(x).abs().max() == 0
    assert all(p[:, fresh._inputs].abs().max() > 0 for p in fresh.hidden_bias)


def test_bad_chunks() -> None:
    with pytest.raises(ValueError, match="chunks must be at most the number of hidden layers, 8, got 9"):
        DeepNarrowMLP(2, 1, 10, chunks=9)
    with pytest.raises(ValueError, match="chunks must be at least 1, got 0"):
        DeepNarrowMLP(2, 1, 10, chunks=0)
    first, bias, hidden, hidden_bias, last, last_bias = (p.detach() for p in DeepNarrowMLP(2, 1, 10).parameters())
    x = torch.zeros(3, 2)

    def run(weights: Any, biases: Any) -> Tensor:
        return mlp_chain(x, first, bias, weights, biases, last, last_bias, scale=1.0)

    halves = hidden.split(4), hidden_bias.split(4)
    torch.testing.assert_close(run(*halves), run(hidden, hidden_bias))
    wrongs: list[Any] = [(halves[0], hidden_bias), (halves[0], halves[1][:1]), ([], [])]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="must both be tensors, or lists of as many chunks, at least one"):
            run(*wrong)
    with pytest.raises(ValueError, match=r"hidden_weight\[0\] must have at least one layer"):
        run([hidden[:0], hidden], [hidden_bias[:0], hidden_bias])
    with pytest.raises(ValueError, match=r"hidden_bias must have shape \(4, 4\), got \(8, 4\)"):
        run(halves[0], [hidden_bias, hidden_bias])


def test_borders_are_even() -> None:
    sizes = [p.shape[0] for p in DeepNarrowMLP(2, 1, 12, chunks=4).hidden_weight]
    assert sizes == [2, 3, 2, 3]
    assert all(abs(a - b) <= 1 for a, b in pairwise(sizes))


def _everything(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name, those of chunks joined."""
    out = model(x)
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    grads = torch.autograd.grad((out * weight).sum(), [x, *model.parameters()])
    found: dict[str, list[Tensor]] = {"out": [out.detach()], "x": [grads[0]]}
    for (name, _), grad in zip(model.named_parameters(), grads[1:], strict=True):
        found.setdefault(name.partition(".")[0], []).append(grad)
    return {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in found.items()}


@pytest.mark.parametrize("batch", [1, 17, 300])
@pytest.mark.parametrize("depth", [40, 131])
@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("inputs", [2, 12, 64, "image"])
def test_where_a_chain_is_cut_changes_no_bit_in_float32(inputs: Any, form: Any, depth: int, batch: int) -> None:
    def build(**settings: Any) -> Any:
        if inputs == "image":
            return DeepNarrowCNN(1, 2, depth, scale=5.0, form=form, **settings)
        return DeepNarrowMLP(inputs, 1, depth, scale=5.0, form=form, **settings)

    x = torch.rand((batch, 1, 5, 4) if inputs == "image" else (batch, inputs), requires_grad=True)
    model = build(checkpoint="none")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    wanted = _everything(model, x)
    for settings in (
        {"checkpoint": 7},
        {"checkpoint": (7, 2)},
        {"checkpoint": (16, 1)},
        {"chunks": 5},
        {"chunks": 5, "checkpoint": (3, 2)},
        {"chunks": 3, "checkpoint": "none"},
    ):
        cut = build(**settings)
        cut.load_state_dict(model.state_dict())
        for name, value in _everything(cut, x).items():
            assert torch.equal(value, wanted[name]), (settings, name)
