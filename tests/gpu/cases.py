"""Inputs and comparisons shared by every way to run the Triton kernels: interpreter, executed PTX, real device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from narrowdeep.ops.mlp import reference as mlp_reference


@dataclass(frozen=True)
class Case:
    """One chain: ``out_features = width - 1 - in_features`` in offset form."""

    in_features: int
    out_features: int
    depth: int
    batch: int
    offset: bool
    dtype: torch.dtype
    segment: int
    width: int = 0

    @property
    def hidden(self) -> int:
        return self.width or self.in_features + 1 + self.out_features

    def __str__(self) -> str:
        form = "offset" if self.offset else "plain"
        kind = str(self.dtype).removeprefix("torch.")
        return f"n{self.hidden}-L{self.depth}-B{self.batch}-{form}-{kind}-k{self.segment}"


SCALE = 10.0


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal, the same numbers for both dtypes up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def mlp_inputs(case: Case) -> tuple[Tensor, ...]:
    """x and the six parameters; hidden layers keep the size of a state about constant, and units do die."""
    n, hidden, dtype = case.hidden, case.depth - 2, case.dtype
    factor = 1 / case.depth if case.offset else (1.5 / n) ** 0.5
    return (
        draw(case.batch, case.in_features, dtype=dtype, seed=1),
        draw(n, case.in_features, dtype=dtype, seed=2),
        draw(n, dtype=dtype, seed=3),
        draw(hidden, n, n, dtype=dtype, seed=4) * factor,
        draw(hidden, n, dtype=dtype, seed=5) * (factor if case.offset else 0.1),
        draw(case.out_features, n, dtype=dtype, seed=6),
        draw(case.out_features, dtype=dtype, seed=7),
    )


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Relative to the largest entry: 1e-10 in float64, 2e-5 in float32."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, what
    if not expected.numel():
        return
    error = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    assert error < (2e-5 if expected.dtype == torch.float32 else 1e-10), f"{what}: relative error {error:.2e}"


def check_mlp(case: Case, forward: Callable[..., Any], backward: Callable[..., Any], jvp: Callable[..., Any]) -> None:
    """All three raw ops against the reference."""
    inputs = mlp_inputs(case)
    settings = (SCALE, case.offset, case.segment)
    out, saved = forward(*inputs, *settings)
    expected_out, expected_saved = mlp_reference.mlp_forward(*inputs, *settings)
    assert_close(out, expected_out, "out")
    assert_close(saved, expected_saved, "saved")
    grad = draw(*out.shape, dtype=case.dtype, seed=8)
    flags = [(True, True), (True, False)] if case.segment % 2 else [(True, True), (False, True)]
    names = ("x", "first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")
    for need in flags:
        gradients = backward(grad, *inputs, saved, *settings, *need)
        expected = mlp_reference.mlp_backward(grad, *inputs, expected_saved, *settings, *need)
        for name, a, b in zip(names, gradients, expected, strict=True):
            assert_close(a, b, f"gradient of {name}")
    tangents: list[Tensor | None] = [draw(*t.shape, dtype=case.dtype, seed=20 + i) for i, t in enumerate(inputs)]
    if case.segment == 1:  # without tangents of the hidden layers: another kernel
        tangents[3] = tangents[4] = None
    assert_close(
        jvp(*inputs, *tangents, *settings[:2]), mlp_reference.mlp_jvp(*inputs, *tangents, *settings[:2]), "tangent"
    )


@contextlib.contextmanager
def replaced(module: Any, **names: Any) -> Iterator[None]:
    """``module`` with other ``launch`` or ``empty``, or smaller limits."""
    with mock.patch.multiple(module, **names):
        yield
