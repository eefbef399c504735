"""Inputs and comparisons shared by every way to run the Triton kernels: interpreter, executed PTX, real device."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowdeep.ops import reference
from narrowdeep.ops.cnn import layered as cnn_layered
from narrowdeep.ops.cnn import reference as cnn_reference
from narrowdeep.ops.gram import reference as gram_reference
from narrowdeep.ops.mlp import layered as mlp_layered
from narrowdeep.ops.mlp import reference as mlp_reference
from narrowdeep.ops.params import Affine
from narrowdeep.ops.reference import saved_shape
from tests.ops.chains import truths


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


def trained(case: Case, scale: float = 1000.0, seed: int = 0) -> tuple[Tensor, ...]:
    """x of both signs and six parameters of the size that training gives them: random middle units, small rest."""
    x, first, first_bias, weight, bias, last, last_bias = draw_inputs(case)
    layers, n, kind = case.depth - 2, case.hidden, case.dtype
    if not case.offset:  # plain form: near the identity, so that units live
        weight = torch.eye(n, dtype=kind) + draw(layers, n, n, dtype=kind, seed=seed + 4) * (1 / layers**0.5)
        return x, first, first_bias, weight, bias, last, last_bias
    weight = draw(layers, n, n, dtype=kind, seed=seed + 4) * (3 / layers / scale)
    bias = draw(layers, n, dtype=kind, seed=seed + 5) * (3 / layers)
    weight[:, case.in_features] = draw(layers, n, dtype=kind, seed=seed + 14)
    bias[:, case.in_features] = draw(layers, dtype=kind, seed=seed + 15) * scale
    return x, first / scale, first_bias * 0.1, weight, bias, last / scale, last_bias


def first_state(case: Case, inputs: tuple[Tensor, ...], scale: float = 1000.0) -> tuple[Tensor, Tensor, Tensor]:
    """(base, hi, lo) before the first hidden layer."""
    return reference.initial(mlp_reference.linear, inputs[0], Affine(*inputs[1:3]), case.out_features, scale, True)


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Relative to the largest entry: 1e-10 in float64, 2e-5 in float32."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, what
    if not expected.numel():
        return
    error = (actual - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)
    assert error < (2e-5 if expected.dtype == torch.float32 else 1e-10), f"{what}: relative error {error:.2e}"


Ops = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]
"""Forward, backward and jvp of one family, with the arguments of ``narrowdeep.ops.chain``."""

MLP_TRUTH = truths(mlp_reference.mlp_forward)
CNN_TRUTH = truths(cnn_reference.cnn_forward)
NAMES = ("x", "first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")


def doubled(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors in float64, all else as it is."""
    return tuple(v.double() if isinstance(v, Tensor) else v for v in values)


def check(case: Case, ops: Ops) -> None:
    """Forward, backward and jvp of a whole network against the reference in float64."""
    (forward, backward, jvp), truth = ops, CNN_TRUTH if case.image else MLP_TRUTH
    inputs = draw_inputs(case)
    settings = (SCALE, case.offset, case.out_features, 0)

    def agree(actual: Tensor, expected: Tensor, what: str) -> None:
        assert_close(actual, expected.to(case.dtype), what)

    out, saved = forward(*inputs, *settings, case.segment)
    expected_out, expected_saved = truth.forward(*doubled(inputs), *settings, case.segment)
    agree(out, expected_out, "out")
    agree(saved, expected_saved, "saved")
    grad = draw(*out.shape, dtype=case.dtype, seed=8)
    for need in [(True, True), (True, False) if case.segment % 2 else (False, True)]:
        gradients = backward(grad, *inputs, saved, *settings, case.segment, *need)
        arguments = doubled((grad, *inputs, expected_saved, *settings, case.segment, *need))
        for name, a, b in zip(NAMES, gradients, truth.backward(*arguments), strict=True):
            agree(a, b, f"gradient of {name}")
    tangents: list[Tensor | None] = [draw(*t.shape, dtype=case.dtype, seed=20 + i) for i, t in enumerate(inputs)]
    if case.segment == 1:  # without tangents of the hidden layers: another kernel
        tangents[3] = tangents[4] = None
    arguments = (*inputs, *tangents, *settings)
    agree(jvp(*arguments), truth.jvp(*doubled(arguments)), "tangent")


def check_spans(case: Case, ops: Ops, cuts: tuple[int, ...], tangent_bits: bool = True) -> None:
    """A network cut at the states ``cuts`` gives the bits of the whole: outputs, gradients, tangents.

    Without ``tangent_bits`` tangents agree up to rounding: jvp computes states in another order than forward.
    """
    forward, backward, jvp = ops
    x, *params = draw_inputs(case)
    settings = (SCALE, case.offset, case.out_features)
    out, saved = forward(x, *params, *settings, 0, case.segment)
    grad = draw(*out.shape, dtype=case.dtype, seed=8)
    gradients = backward(grad, x, *params, saved, *settings, 0, case.segment, True, True)
    tangents = [draw(*t.shape, dtype=case.dtype, seed=20 + i) for i, t in enumerate((x, *params))]
    tangent = jvp(x, *params, *tangents, *settings, 0)

    bounds = list(zip((0, *cuts), (*cuts, case.depth - 2), strict=True))

    def part(values: list[Tensor], low: int, high: int) -> list[Tensor | None]:
        first, hidden, last = values[:2], values[2:4], values[4:]
        ends = (first if low == 0 else [None, None]), (last if high == case.depth - 2 else [None, None])
        return [*ends[0], *(t[low:high] for t in hidden), *ends[1]]

    inputs, checkpoints, value, moved = [], [], x, tangents[0]
    for low, high in bounds:
        inputs.append(value)
        some = part(params, low, high)
        moved = jvp(value, *some, moved, *part(tangents[1:], low, high), *settings, low)
        value, kept = forward(value, *some, *settings, low, case.segment)
        ends = low == 0, high == case.depth - 2
        state = (case.hidden, *case.image, case.batch)
        assert kept.shape == saved_shape(high - low, state, case.offset, case.segment, *ends)
        if not ends[1]:
            assert value.shape == moved.shape == (3 if case.offset else 1, *state)
        checkpoints.append(kept)
    assert torch.equal(value, out)
    assert_close(moved, tangent, "tangent")
    assert torch.equal(moved, tangent) or not tangent_bits
    found: list[tuple[Tensor, ...]] = []
    for (low, high), before, kept in reversed(list(zip(bounds, inputs, checkpoints, strict=True))):
        flags = (case.segment, True, True)
        grad, *some_grads = backward(grad, before, *part(params, low, high), kept, *settings, low, *flags)
        assert grad.shape == before.shape
        found.insert(0, tuple(some_grads))
    for i, name in enumerate(NAMES[1:]):
        pieces = [grads[i] for grads in found if grads[i].numel()]
        assert torch.equal(torch.cat(pieces) if len(pieces) > 1 else pieces[0], gradients[1 + i]), name
    assert torch.equal(grad, gradients[0])


def check_state(case: Case, ops: Ops, start: int) -> None:
    """Hidden layers alone from a state that no chain need have made: output and tangent against float64."""
    (forward, _, jvp), truth = ops, CNN_TRUTH if case.image else MLP_TRUTH
    _, *params = draw_inputs(case)
    hidden = [None, None, *params[2:4], None, None]
    tangents = [draw(*t.shape, dtype=case.dtype, seed=30 + i) for i, t in enumerate(params[2:4])]
    shape = (3 if case.offset else 1, case.hidden, *case.image, case.batch)
    state, state_t = draw(*shape, dtype=case.dtype, seed=40), draw(*shape, dtype=case.dtype, seed=41)
    settings = (SCALE, case.offset, case.out_features, start)
    out, _ = forward(state, *hidden, *settings, case.segment)
    expected, _ = truth.forward(*doubled((state, *hidden, *settings)), case.segment)
    assert torch.equal(out[0], expected[0].to(case.dtype)) or not case.offset
    assert_close(out.sum(0), expected.sum(0).to(case.dtype), "state")
    arguments = (state, *hidden, state_t, None, None, *tangents, None, None, *settings)
    assert_close(jvp(*arguments).sum(0), truth.jvp(*doubled(arguments)).sum(0).to(case.dtype), "tangent")


ALL_GIVEN = 0b11111111


@dataclass(frozen=True)
class SecondCase:
    """The tangent of the backward of a network, or of a span of it that has neither or one of its ends."""

    case: Case
    first: bool = True
    last: bool = True
    start: int = 0
    given: int = ALL_GIVEN
    """Bits of the tangents that are not None: of the gradient, the input and the six parameters."""

    def __str__(self) -> str:
        ends = f"{'x' if self.first else self.start}to{'y' if self.last else 'state'}"
        return f"second-{self.case}-{ends}-{self.given:08b}"


def draw_words(case: Case, kind: str, seed: int) -> Tensor:
    """A state, its tangent T or its gradient G, with 0 in the words that a chain leaves at 0."""
    shape = (3 if case.offset else 1, case.hidden, *case.image, case.batch)
    words, middle = draw(*shape, dtype=case.dtype, seed=seed), case.hidden - case.out_features - 1
    if case.offset:
        words[:2, middle] = 0
        words[0, middle + 1 :] = SCALE if kind == "state" else 0
        if kind == "gradient":
            words[0] = 0
            right = (case.out_features, *(1 for _ in case.image), case.batch)
            words[0, middle + 1 :] = draw(*right, dtype=case.dtype, seed=seed + 1)
    return words


def draw_second(second: SecondCase) -> tuple[Any, ...]:
    """(grad, grad_t, input, six parameters, their seven tangents, settings) of ``backward_jvp``."""
    case = second.case
    x, *params = draw_inputs(case)
    out = case.batch, case.out_features
    grads = [draw(*out, dtype=case.dtype, seed=i) for i in (8, 9)]
    if not second.last:
        grads = [draw_words(case, "gradient", i) for i in (50, 52)]
    values: list[Any] = [x if second.first else draw_words(case, "state", 54), *params]
    tangents = [draw(*t.shape, dtype=case.dtype, seed=20 + i) for i, t in enumerate(values)]
    if not second.first:
        tangents[0] = draw_words(case, "tangent", 56)
    moving = [grads[1], *tangents]
    grad_t, *tangents_t = [t if second.given >> i & 1 else None for i, t in enumerate(moving)]
    for i in (*(() if second.first else (1, 2)), *(() if second.last else (5, 6))):
        values[i] = tangents_t[i] = None
    return grads[0], grad_t, *values, *tangents_t, SCALE, case.offset, case.out_features, second.start


def check_second(second: SecondCase, op: Callable[..., tuple[Tensor, ...]]) -> None:
    """A network against autograd through the reference in float64, a span against its layers in float64."""
    case = second.case
    arguments = draw_second(second)
    layers = cnn_layered.cnn_backward_jvp if case.image else mlp_layered.mlp_backward_jvp
    truth = (CNN_TRUTH if case.image else MLP_TRUTH).backward_jvp if second.first and second.last else layers
    found = op(*arguments, True, True)
    for name, value, actual, expected in zip(
        NAMES, arguments[2:9], found, truth(*doubled(arguments), True, True), strict=True
    ):
        assert actual.shape == (torch.Size([0]) if value is None else value.shape), name
        whole = name == "x" and not second.first  # where a state's gradient is rounded depends on its words
        wanted = expected.to(case.dtype)
        assert_close(actual.sum(0) if whole else actual, wanted.sum(0) if whole else wanted, f"tangent of {name}")
    for need in [(True, False), (False, True)] if case.depth < 10 else []:
        needed = need[0], *[need[1]] * 6
        for some, actual, same in zip(needed, op(*arguments, *need), found, strict=True):
            assert torch.equal(actual, same) if some else actual.shape == (0,)


def check_second_spans(
    case: Case, ops: Ops, op: Callable[..., tuple[Tensor, ...]], cuts: tuple[int, ...], bits: bool = True
) -> None:
    """A network cut at the states ``cuts`` gives the bits of the whole.

    Without ``bits`` they agree up to rounding: ``op`` computes states in another order than forward, which cuts them.
    """
    forward, backward, jvp = ops
    grad, grad_t, x, *rest = draw_second(SecondCase(case))
    params, (x_t, *params_t), settings = rest[:6], rest[6:13], rest[13:16]
    wanted = op(grad, grad_t, x, *rest, True, True)
    bounds = list(zip((0, *cuts), (*cuts, case.depth - 2), strict=True))

    def part(values: list[Tensor], low: int, high: int) -> list[Tensor | None]:
        first = values[:2] if low == 0 else [None, None]
        last = values[4:] if high == case.depth - 2 else [None, None]
        return [*first, *(t[low:high] for t in values[2:4]), *last]

    values, tangents = [x], [x_t]
    for low, high in bounds:
        some, some_t = part(params, low, high), part(params_t, low, high)
        tangents.append(jvp(values[-1], *some, tangents[-1], *some_t, *settings, low))
        values.append(forward(values[-1], *some, *settings, low, 0)[0])
    found: list[tuple[Tensor, ...]] = []
    for i, (low, high) in reversed(list(enumerate(bounds))):
        some, some_t = part(params, low, high), part(params_t, low, high)
        both = grad, grad_t, values[i], *some, tangents[i], *some_t, *settings, low, True, True
        grad_t, *grads = op(*both)
        grad = backward(grad, values[i], *some, x.new_empty(0), *settings, low, 0, True, False)[0]
        found.insert(0, tuple(grads))
    whole = [[grad_t], *([grads[i] for grads in found if grads[i].numel()] for i in range(len(NAMES) - 1))]
    for name, pieces, expected in zip(NAMES, whole, wanted, strict=True):
        joined = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if bits:
            assert torch.equal(joined, expected), name
        else:
            assert_close(joined, expected, f"tangent of {name}")


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
