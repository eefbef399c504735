"""The convolution ops: reference against autograd of eager layers, engine against reference, in every build."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowdeep.ops import engine
from narrowdeep.ops.conv import reference
from narrowdeep.ops.conv.op import ops
from narrowdeep.ops.reference import saved_shape

ISAS = engine.instruction_sets()
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}


class Case(NamedTuple):
    inputs: int
    outputs: int
    depth: int
    size: int
    height: int
    width: int
    batch: int

    @property
    def channels(self) -> int:
        return self.inputs + 1 + self.outputs


CASES = [
    Case(1, 1, 40, 3, 7, 7, 20),  # the thesis's network
    Case(1, 1, 2, 3, 7, 7, 1),  # no hidden layer
    Case(1, 10, 12, 3, 7, 7, 5),
    Case(2, 2, 70, 5, 9, 6, 37),  # moved twice
    Case(1, 1, 3, 7, 2, 3, 2),  # the filter is larger than the image
    Case(1, 1, 129, 1, 4, 5, 3),
    Case(3, 4, 6, 3, 1, 1, 9),
    Case(5, 1, 4, 7, 8, 8, 0),
    Case(2, 9, 5, 3, 5, 13, 17),
    Case(2, 29, 3, 3, 3, 32, 2),  # 32 channels
]
LONG = Case(1, 2, 300, 3, 2, 3, 3)  # a segment of all its layers is divided again


def arguments(case: Case, dtype: torch.dtype, offset: bool) -> tuple[Tensor, ...]:
    """x and the six parameters, away from initialisation, scaled so that neither states nor gradients explode."""
    n, f = case.channels, case.size
    std = (0.03 if offset else 1.4) / (n * f * f) ** 0.5
    tensors = (
        torch.randn(case.batch, case.inputs, case.height, case.width),
        torch.randn(n, case.inputs, f, f),
        torch.randn(n) * 0.1,
        torch.randn(case.depth - 2, n, n, f, f) * std,
        torch.randn(case.depth - 2, n) * 0.1,
        torch.randn(case.outputs, n, f, f),
        torch.randn(case.outputs),
    )
    return tuple(t.to(dtype) for t in tensors)


def double(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)


def eager(args: tuple[Tensor, ...], scale: float, offset: bool) -> Tensor:
    """The same network by conv2d, with W = E + Delta put together here."""
    h, first, first_bias, hidden, hidden_bias, last, last_bias = args
    if offset:
        inputs, outputs, middle = h.shape[1], last.shape[0], first.shape[-1] // 2
        right = first.shape[0] - outputs
        first_part, hidden_part, last_part = (torch.zeros_like(w) for w in (first, hidden, last))
        for i in range(inputs):
            first_part[i, i, middle, middle] = scale
            hidden_part[:, i, i, middle, middle] = 1
        for i in range(outputs):
            hidden_part[:, right + i, right + i, middle, middle] = 1
            last_part[i, right + i, middle, middle] = 1
        base = torch.zeros_like(first_bias)
        base[right:] = scale
        first, hidden, last = first + first_part, hidden + hidden_part, last + last_part
        first_bias, last_bias = first_bias + base, last_bias - scale
    pad = first.shape[-1] // 2
    h = torch.relu(torch.nn.functional.conv2d(h, first, first_bias, padding=pad))
    for weight, bias in zip(hidden, hidden_bias, strict=True):
        h = torch.relu(torch.nn.functional.conv2d(h, weight, bias, padding=pad))
    return torch.nn.functional.conv2d(h, last, last_bias, padding=pad).mean((2, 3))


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest entry: an entry is a sum of terms of that size."""
    assert actual.shape == expected.shape
    scale = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance * max(scale, 1e-30))


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("case", [c for c in CASES if c.batch], ids=str)
def test_reference_is_the_eager_network(case: Case, offset: bool) -> None:
    args = tuple(t.requires_grad_() for t in arguments(case, torch.float64, offset))
    expected = eager(args, 5.0, offset)
    grad_out = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, args, grad_out, materialize_grads=True)
    with torch.no_grad():
        out, saved = reference.conv_forward(*args, 5.0, offset, 0)
        grads = reference.conv_backward(grad_out, *args, saved, 5.0, offset, 0, True, True)
        tangents = tuple(torch.randn_like(t) for t in args)
        tangent = reference.conv_jvp(*args, *tangents, 5.0, offset)
    assert_close(out, expected.detach(), 1e-12)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, 1e-11)
    along = sum((w * t).sum() for w, t in zip(wanted, tangents, strict=True))
    torch.testing.assert_close((tangent * grad_out).sum(), torch.as_tensor(along), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("offset", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", [*CASES, LONG], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_engine_is_the_reference(
    isa: str, case: Case, dtype: torch.dtype, offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    args, tolerance = arguments(case, dtype, offset), TOLERANCE[dtype]
    grad_out = torch.randn(case.batch, case.outputs, dtype=dtype)
    out, states = reference.conv_forward(*double(args), 7.0, offset, 1)
    grads = reference.conv_backward(grad_out.double(), *double(args), states, 7.0, offset, 1, True, True)
    results = []
    # Empties hold NaN: what the engine leaves unwritten does not pass.
    torch.use_deterministic_algorithms(True)
    try:
        for segment in (1, 0, 2, 5, 64, 1000):
            got, saved = ops.forward(*args, 7.0, offset, segment)
            state = (case.channels, case.height, case.width, case.batch)
            assert saved.shape == saved_shape(case.depth, state, offset, segment)
            if segment == 1:
                assert_close(saved, states, tolerance)
            results.append((got, *ops.backward(grad_out, *args, saved, 7.0, offset, segment, True, True)))
        tangents = tuple(torch.randn_like(t) for t in args)
        some = tuple(t if i in (1, 2, 4, 5) else None for i, t in enumerate(tangents))
        for given_tangents in (tangents, some):
            doubles = [None if t is None else t.double() for t in given_tangents]
            expected = reference.conv_jvp(*double(args), *doubles, 7.0, offset)
            assert_close(ops.jvp(*args, *given_tangents, 7.0, offset), expected, tolerance)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, got, want in zip(
        ("out", "x", "w1", "b1", "wh", "bh", "wl", "bl"), results[0], (out, *grads), strict=True
    ):
        assert not got.isnan().any(), name
        assert_close(got, want, tolerance)
    for other in results[1:]:  # a segment changes no bit
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("need_input", "need_params"), [(True, False), (False, True), (False, False)])
def test_what_is_not_needed_is_empty_and_changes_nothing(need_input: bool, need_params: bool) -> None:
    args = arguments(CASES[0], torch.float32, True)
    grad_out = torch.randn(CASES[0].batch, 1)
    _, saved = ops.forward(*args, 7.0, True, 8)
    full = ops.backward(grad_out, *args, saved, 7.0, True, 8, True, True)
    part = ops.backward(grad_out, *args, saved, 7.0, True, 8, need_input, need_params)
    for i, (a, b) in enumerate(zip(part, full, strict=True)):
        assert torch.equal(a, b) if (need_params if i else need_input) else a.shape == (0,)


@settings(max_examples=60)
@given(
    case=st.builds(
        Case,
        inputs=st.integers(1, 5),
        outputs=st.integers(1, 5),
        depth=st.integers(2, 40),
        size=st.sampled_from([1, 3, 5, 7]),
        height=st.integers(1, 10),
        width=st.integers(1, 10),
        batch=st.integers(0, 40),
    ),
    offset=st.booleans(),
    segment=st.integers(0, 50),
    isa=st.sampled_from(ISAS),
)
def test_any_shape(case: Case, offset: bool, segment: int, isa: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NARROWDEEP_ISA", isa)
        args = arguments(case, torch.float64, offset)
        grad_out = torch.randn(case.batch, case.outputs, dtype=torch.float64)
        out, saved = ops.forward(*args, 2.0, offset, segment)
        grads = ops.backward(grad_out, *args, saved, 2.0, offset, segment, True, True)
    expected, states = reference.conv_forward(*args, 2.0, offset, segment)
    wanted = reference.conv_backward(grad_out, *args, states, 2.0, offset, segment, True, True)
    assert_close(out, expected, 1e-11)
    for grad, want in zip(grads, wanted, strict=True):
        assert_close(grad, want, 1e-10)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradients_are_the_same_in_every_run(count: int) -> None:
    torch.set_num_threads(count)
    args = arguments(Case(1, 2, 20, 3, 5, 5, 150), torch.float32, True)
    grad_out = torch.randn(150, 2)
    _, saved = ops.forward(*args, 7.0, True, 8)
    first = ops.backward(grad_out, *args, saved, 7.0, True, 8, True, True)
    for _ in range(5):
        again = ops.backward(grad_out, *args, saved, 7.0, True, 8, True, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("isa", ISAS)
def test_a_bad_sample_spoils_what_it_spoils_in_eager_layers(
    isa: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    args = arguments(Case(1, 1, 6, 3, 4, 4, 5), torch.float64, False)
    args[0][3, 0, 1, 2] = bad
    wanted = eager(args, 1.0, False)
    out, saved = ops.forward(*args, 1.0, False, 4)
    torch.testing.assert_close(out, wanted, equal_nan=True)
    assert out[[0, 1, 2, 4]].isfinite().all()
    assert not out[3].isfinite().all()
    # The other samples' gradients are theirs alone.
    grad_x, *_ = ops.backward(torch.ones_like(out), *args, saved, 1.0, False, 4, True, True)
    assert grad_x[[0, 1, 2, 4]].isfinite().all()


def test_an_infinite_sample_in_the_last_tile_leaves_no_trace_in_the_lanes_without_samples() -> None:
    args = arguments(Case(1, 1, 6, 1, 1, 1, 1), torch.float32, False)
    args[0][0] = float("inf")
    args = (args[0], *(p.abs() for p in args[1:]))
    _, saved = ops.forward(*args, 1.0, False, 4)
    got = ops.backward(torch.ones(1, 1), *args, saved, 1.0, False, 4, False, True)
    want = reference.conv_backward(torch.ones(1, 1), *args, saved, 1.0, False, 4, False, True)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b)
        assert not a.isnan().any()


@pytest.mark.parametrize("segment", [0, 1, 8])
def test_opcheck(segment: int) -> None:
    args = arguments(Case(1, 2, 12, 3, 3, 4, 6), torch.float64, True)
    namespace = torch.ops.narrowdeep
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(namespace.conv_forward.default, (*args, 3.0, True, segment), test_utils=tests)
    out, saved = ops.forward(*args, 3.0, True, segment)
    torch.library.opcheck(
        namespace.conv_backward.default, (out, *args, saved, 3.0, True, segment, True, True), test_utils=tests
    )
    torch.library.opcheck(namespace.conv_jvp.default, (*args, *args, 3.0, True), test_utils=tests)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_inputs_need_not_be_contiguous(layout: str) -> None:
    args = list(arguments(Case(2, 2, 5, 3, 4, 4, 6), torch.float64, True))
    if layout == "transposed":
        args[0], args[3] = args[0].transpose(2, 3), args[3].transpose(-1, -2)
    elif layout == "expanded":
        args[0], args[4] = args[0][:1].expand(6, -1, -1, -1), args[4][:1].expand(3, -1)
    else:
        args[0], args[2] = args[0][::2], args[2].repeat_interleave(2)[::2]
    grad_out = torch.ones(1, 1, dtype=torch.float64).expand(args[0].shape[0], 2)
    plain = [t.contiguous() for t in args]
    out, saved = ops.forward(*args, 3.0, True, 2)
    want, states = ops.forward(*plain, 3.0, True, 2)
    assert torch.equal(out, want)
    grads = ops.backward(grad_out, *args, saved, 3.0, True, 2, True, True)
    wanted = ops.backward(grad_out.contiguous(), *plain, states, 3.0, True, 2, True, True)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))


def test_the_engine_checks_what_it_is_given() -> None:
    args = list(arguments(Case(1, 1, 4, 3, 4, 4, 2), torch.float32, True))
    even = [args[0], *(w[..., :2, :2] if w.dim() >= 4 else w for w in args[1:])]
    with pytest.raises(RuntimeError, match="odd size, got 2"):
        ops.forward(*even, 1.0, True, 4)
    with pytest.raises(RuntimeError, match="x must have 4 dimensions, got 3"):
        ops.forward(args[0][0], *args[1:], 1.0, True, 4)
    with pytest.raises(RuntimeError, match="hidden_weight must have size 3 in dimension 4, got 2"):
        ops.forward(*args[:3], args[3][..., :2], *args[4:], 1.0, True, 4)
    with pytest.raises(RuntimeError, match="at least 1x1 pixels, got 4x0"):
        ops.forward(args[0][..., :0], *args[1:], 1.0, True, 4)
    _, saved = ops.forward(*args, 1.0, True, 1)
    with pytest.raises(RuntimeError, match="saved must have size 1 in dimension 0, got 3"):
        ops.backward(torch.ones(2, 1), *args, saved, 1.0, True, 2, True, True)
