"""Inputs and comparisons shared by every way to run the Triton kernels: interpreter, executed PTX, real device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowdeep.ops.cnn import reference as conv_reference
from narrowdeep.ops.gram import reference as gram_reference
from narrowdeep.ops.mlp import reference as mlp_reference


@dataclass(frozen=True)
class Case:
    """One chain; ``width`` other than in + 1 + out is for the plain form."""

    in_features: int
    out_features: int
    depth: int
    batch: int
    offset: bool
    dtype: torch.dtype
    segment: int
    width: int = 0
    image: tuple[int, ...] = ()
    """(H, W) makes it a convolution chain."""
    tap: int = 3

    @property
    def hidden(self) -> int:
        return self.width or self.in_features + 1 + self.out_features

    def __str__(self) -> str:
        form = "offset" if self.offset else "plain"
        kind = str(self.dtype).removeprefix("torch.")
        image = f"-{self.image[0]}x{self.image[1]}f{self.tap}" if self.image else ""
        return f"n{self.hidden}{image}-L{self.depth}-B{self.batch}-{form}-{kind}-k{self.segment}"


SCALE = 10.0


def draw(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Standard normal, the same numbers for both dtypes up to rounding."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw_inputs(case: Case) -> tuple[Tensor, ...]:
    """x and the six parameters; hidden layers keep the size of a state about constant, and units do die."""
    n, hidden, dtype = case.hidden, case.depth - 2, case.dtype
    taps = (case.tap, case.tap) if case.image else ()
    spread = math.prod(taps) ** 0.5
    factor = 1 / case.depth if case.offset else (1.5 / n) ** 0.5
    return (
        draw(case.batch, case.in_features, *case.image, dtype=dtype, seed=1),
        draw(n, case.in_features, *taps, dtype=dtype, seed=2) / spread,
        draw(n, dtype=dtype, seed=3),
        draw(hidden, n, n, *taps, dtype=dtype, seed=4) * (factor / spread),
        draw(hidden, n, dtype=dtype, seed=5) * (factor if case.offset else 0.1),
        draw(case.out_features, n, *taps, dtype=dtype, seed=6) / spread,
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


Ops = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]

MLP_REFERENCE: Ops = (mlp_reference.mlp_forward, mlp_reference.mlp_backward, mlp_reference.mlp_jvp)
CONV_REFERENCE: Ops = (conv_reference.conv_forward, conv_reference.conv_backward, conv_reference.conv_jvp)


def check(case: Case, ops: Ops) -> None:
    """Forward, backward and jvp against the reference."""
    (forward, backward, jvp), reference = ops, CONV_REFERENCE if case.image else MLP_REFERENCE
    inputs = draw_inputs(case)
    settings = (SCALE, case.offset, case.segment)
    out, saved = forward(*inputs, *settings)
    expected_out, expected_saved = reference[0](*inputs, *settings)
    assert_close(out, expected_out, "out")
    assert_close(saved, expected_saved, "saved")
    grad = draw(*out.shape, dtype=case.dtype, seed=8)
    names = ("x", "first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")
    for need in [(True, True), (True, False) if case.segment % 2 else (False, True)]:
        gradients = backward(grad, *inputs, saved, *settings, *need)
        expected = reference[1](grad, *inputs, expected_saved, *settings, *need)
        for name, a, b in zip(names, gradients, expected, strict=True):
            assert_close(a, b, f"gradient of {name}")
    tangents: list[Tensor | None] = [draw(*t.shape, dtype=case.dtype, seed=20 + i) for i, t in enumerate(inputs)]
    if case.segment == 1:  # without tangents of the hidden layers: another kernel
        tangents[3] = tangents[4] = None
    assert_close(jvp(*inputs, *tangents, *settings[:2]), reference[2](*inputs, *tangents, *settings[:2]), "tangent")


@dataclass(frozen=True)
class GramCase:
    """The tangent kernel of the case's samples with ``others`` more, or with themselves if 0."""

    case: Case
    others: int
    reduce: int
    trainable: int = gram_reference.ALL_TRAINABLE

    def __str__(self) -> str:
        return f"gram-{self.case}-N{self.others}-r{self.reduce}-t{self.trainable}"


def check_gram(gram_case: GramCase, gram: Callable[..., Tensor]) -> None:
    """The gram op against the reference."""
    case = gram_case.case
    x1, *params = draw_inputs(case)
    x2 = draw(gram_case.others, *x1.shape[1:], dtype=case.dtype, seed=50) if gram_case.others else x1
    settings = (SCALE, case.offset, gram_case.others == 0, gram_case.trainable, gram_case.reduce)
    actual = gram(x1, x2, *params, *settings)
    reference: Callable[..., Tensor] = gram_reference.gram
    family = gram_reference.CNN if case.image else gram_reference.MLP
    expected = reference(family, x1, x2, *params, *settings)
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float64
    if expected.numel():
        error = ((actual - expected).abs().max() / expected.abs().max()).item()
        assert error < (1e-5 if case.dtype == torch.float32 else 1e-12), f"relative error {error:.2e}"
