"""The features of a model at its initialisation against the kernel from its derivatives."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk import empirical_ntk, features

MLPS = [(2, 1, 2), (1, 2, 3), (3, 2, 40), (10, 6, 5)]
CNNS = [(1, 1, 2, 3, (3, 3)), (2, 3, 12, 5, (6, 4)), (1, 2, 4, 5, (3, 1)), (3, 1, 3, 1, (2, 2)), (1, 2, 3, 7, (2, 5))]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"form": "plain", "scale": 3.0, "rho": 0.5, "beta": 0.0},
    {"scale": 1e4, "rho": 2.0, "beta": 0.1},
    {"scale": 0.3, "rho": 0.0},
]


def assert_is_kernel(model: nn.Module, x1: Tensor, x2: Tensor, kernel: Callable[..., Tensor] = empirical_ntk) -> None:
    kernel_, got = kernel(model, x1, x2), features(model, x1) @ features(model, x2).T
    expected = got[:, :, None, None] * torch.eye(kernel_.shape[2], dtype=torch.float64)
    assert (kernel_ - expected).abs().max() <= 1e-12 * kernel_.abs().max()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("d_in", "d_out", "depth"), MLPS)
def test_mlp_features_are_the_kernel(d_in: int, d_out: int, depth: int, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = DeepNarrowMLP(d_in, d_out, depth, dtype=torch.float64, **settings)
    x1, x2 = torch.randn(5, d_in, dtype=torch.float64), torch.rand(4, d_in, dtype=torch.float64)
    assert_is_kernel(model, x1, x2)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize(("c", "k", "depth", "size", "image"), CNNS)
def test_cnn_features_are_the_kernel(
    c: int, k: int, depth: int, size: int, image: tuple[int, int], settings: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = DeepNarrowCNN(c, k, depth, kernel_size=size, dtype=torch.float64, **settings)
    x1, x2 = torch.randn(5, c, *image, dtype=torch.float64), torch.rand(4, c, *image, dtype=torch.float64)
    assert_is_kernel(model, x1, x2)


Narrow = DeepNarrowMLP | DeepNarrowCNN


def small(kind: str, dtype: torch.dtype = torch.float64, **settings: Any) -> tuple[Narrow, Tensor]:
    torch.manual_seed(0)
    if kind == "mlp":
        return DeepNarrowMLP(3, 2, 9, dtype=dtype, **settings), torch.randn(4, 3, dtype=dtype)
    return DeepNarrowCNN(2, 2, 9, dtype=dtype, **settings), torch.randn(4, 2, 5, 4, dtype=dtype)


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_features_against_autograd_through_eager_layers(kind: str) -> None:
    model, x = small(kind, rho=0.7, beta=0.3)
    eager = model.to_sequential()
    params = dict(eager.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(eager, p, (x,)))(params)
    flat = torch.cat([part.flatten(2) for part in jacobian.values()], 2)
    kernel = torch.einsum("iap,jbp->ijab", flat, flat)
    assert_is_kernel(model, x, x, lambda *_: kernel * model.ntk_lr)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_frozen_parameters_are_left_out(kind: str, chunks: int) -> None:
    for frozen in ["first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias"]:
        model, x = small(kind, chunks=chunks)
        part = getattr(model, frozen)
        (part[1] if isinstance(part, nn.ParameterList) else part).requires_grad_(False)  # one chunk of three
        assert_is_kernel(model, x, x)
    for param in model.parameters():
        param.requires_grad_(False)
    assert torch.equal(features(model, x), torch.zeros(4, 1, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_blocks_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(kind)
    whole = features(model, x)
    for name in ("_BLOCK_BYTES", "_TILE_BYTES"):
        monkeypatch.setattr(sys.modules["narrowdeep.ntk.features"], name, 1)
        torch.testing.assert_close(features(model, x), whole, rtol=1e-14, atol=1e-14)
    assert features(model, x[:0]).shape == (0, whole.shape[1])


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_float32(kind: str) -> None:
    """The weights are float32 numbers, what follows is computed in the dtype asked for."""
    model, x = small(kind, torch.float32)
    exact = features(copy.deepcopy(model).double(), x.double())
    assert torch.equal(features(model, x), exact)
    rough = features(model, x, dtype=torch.float32)
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_behind_modules_without_parameters() -> None:
    model, _ = small("cnn")
    x = torch.randn(3, 2, 10, 8, dtype=torch.float64)
    assert_is_kernel(nn.Sequential(nn.AvgPool2d(2), model), x, x)


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_model_that_has_moved_is_refused(kind: str, form: str) -> None:
    for name in ["first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias"]:
        model, x = small(kind, form=form)
        with torch.no_grad():
            getattr(model, name).view(-1)[-1] += 1e-3
        with pytest.raises(ValueError, match=f"initialisation.*: 1 entries of {name} are not"):
            features(model, x)


def test_bad_input() -> None:
    model, x = small("mlp")
    with pytest.raises(ValueError, match=r"x must have shape \(N, 3\), got \(4, 2\)"):
        features(model, x[:, :2])
    with pytest.raises(TypeError, match="same dtype"):
        features(model, x.float())
    with pytest.raises(TypeError, match=r"dtype must be torch.float32 or torch.float64, got torch.float16"):
        features(model, x, dtype=torch.float16)
    with pytest.raises(ValueError, match="model must be a DeepNarrowMLP or DeepNarrowCNN.*got Linear"):
        features(nn.Linear(3, 2), x)
    with pytest.raises(ValueError, match="initialisation"):
        features(DeepNarrowMLP(3, 2, 5, init="kaiming", form="plain", dtype=torch.float64), x)
