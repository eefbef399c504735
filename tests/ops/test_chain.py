"""The chain ops of both families: reference against eager layers, every build of the engine against the reference."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowdeep.ops import engine
from narrowdeep.ops.reference import saved_shape
from tests.ops.chains import NAMES, TOLERANCE, Case, arguments, assert_close, eager, truth

ISAS = engine.instruction_sets()
SEGMENTS = (1, 0, 2, 32, 50, 1000)

MLP_CASES = [
    Case(1, 1, 129, 57),
    Case(1, 1, 2, 1),  # no hidden layer
    Case(1, 1, 34, 0),
    Case(2, 1, 129, 200),
    Case(2, 1, 3, 37),
    Case(2, 1, 34, 1),
    Case(2, 1, 300, 5),  # a segment of all its layers is divided again
    Case(2, 2, 34, 57),
    Case(3, 1, 129, 5),
    Case(4, 3, 34, 37),
    Case(4, 3, 129, 1),
    Case(4, 4, 129, 37),
    Case(5, 4, 66, 37),
    Case(7, 3, 34, 70),
    Case(6, 5, 34, 130),  # the widest that runs in registers
    Case(7, 1, 3, 200),
    Case(8, 8, 34, 57),
    Case(1, 15, 129, 5),
    Case(15, 1, 2, 37),
    Case(12, 10, 34, 57),
    Case(12, 10, 129, 1),
    Case(64, 10, 34, 37),
    Case(64, 10, 3, 200),
    Case(64, 10, 2, 0),
    Case(64, 10, 5, 1),
    Case(149, 10, 9, 57),  # more states than this, and float32 would put some ReLU on the other side of 0
    Case(149, 10, 34, 5),
    Case(149, 10, 2, 1),
    # Few samples, whose lanes run over the rows of weights; rows that are not whole vectors, or are.
    Case(12, 10, 34, 2),
    Case(3, 44, 34, 3),
    Case(29, 2, 20, 1),
    Case(37, 10, 20, 4),
    Case(70, 9, 5, 2),
    # Weights of more than a MiB.
    Case(149, 370, 3, 5),
    Case(149, 370, 3, 70),
]
CONV_CASES = [
    Case(1, 1, 40, 20, 3, (7, 7)),  # the thesis's network
    Case(1, 1, 2, 1, 3, (7, 7)),  # no hidden layer
    Case(1, 10, 12, 5, 3, (7, 7)),
    Case(2, 2, 70, 17, 5, (9, 6)),  # moved twice
    Case(1, 1, 3, 2, 7, (2, 3)),  # the filter is larger than the image
    Case(1, 1, 129, 3, 1, (4, 5)),
    Case(3, 4, 6, 9, 3, (1, 1)),
    Case(5, 1, 4, 0, 7, (8, 8)),
    Case(2, 9, 5, 17, 3, (5, 13)),
    Case(2, 29, 3, 2, 3, (3, 32)),  # 32 channels
    Case(1, 2, 300, 3, 3, (2, 3)),  # a segment of all its layers is divided again
    Case(2, 1, 40, 1, 3, (17, 3)),  # few images, in strips of rows: the last ones reach past the image
    Case(1, 2, 6, 2, 5, (9, 6)),
    Case(1, 1, 6, 3, 7, (13, 3)),
    Case(1, 2, 34, 1, 7, (7, 2)),  # a filter sees several strips
    Case(1, 1, 5, 4, 9, (3, 4)),  # and past all of them
    Case(2, 1, 34, 12, 3, (16, 2)),  # tiles of whole images
    # Images that fill the lanes, and others in strips; weight gradients with lanes over output channels.
    Case(1, 1, 34, 37, 3, (7, 5)),
    Case(2, 13, 4, 21, 3, (5, 4)),
    Case(4, 28, 3, 37, 3, (4, 17)),
    Case(3, 28, 3, 35, 5, (1, 1)),
    Case(5, 18, 3, 17, 1, (3, 4)),
    Case(2, 13, 3, 9, 7, (16, 3)),
]
CASES = MLP_CASES + CONV_CASES
PLAIN_CASES = [  # the offset form has width in + 1 + out, the plain form any width
    Case(3, 2, 34, 37, hidden=1),
    Case(1, 1, 3, 5, hidden=1),
    Case(3, 2, 129, 57, hidden=2),
    Case(4, 1, 2, 200, hidden=2),
    Case(40, 3, 6, 37, hidden=9),
    Case(2, 30, 5, 57, hidden=4),
    Case(3, 3, 4, 5, 3, (4, 3), hidden=2),
    Case(1, 5, 4, 5, 3, (4, 3), hidden=2),
]
FORMS = [(case, True) for case in CASES] + [(case, False) for case in CASES + PLAIN_CASES]
SMALL = [Case(2, 2, 40, 20), Case(1, 2, 40, 20, 3, (3, 4))]

both_families = pytest.mark.parametrize("case", SMALL, ids=["mlp", "conv"])
every_build = pytest.mark.parametrize("isa", ISAS)


@pytest.fixture
def empties_hold_nan() -> Iterator[None]:
    """What an op leaves unwritten in its results does not pass."""
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("case", "offset"), [(c, o) for c, o in FORMS if c.batch], ids=str)
def test_reference_is_the_eager_network(case: Case, offset: bool) -> None:
    args = tuple(t.requires_grad_() for t in arguments(case, torch.float64, offset))
    expected = eager(case.family, args, 5.0, offset)
    grad_out = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, args, grad_out, materialize_grads=True)
    reference = case.family.reference
    with torch.no_grad():
        out, saved = reference.forward(*args, 5.0, offset, 0)
        grads = reference.backward(grad_out, *args, saved, 5.0, offset, 0, True, True)
        tangents = tuple(torch.randn_like(t) for t in args)
        tangent = reference.jvp(*args, *tangents, 5.0, offset)
    assert_close(out, expected.detach(), 1e-12)
    for name, grad, want in zip(NAMES, grads, wanted, strict=True):
        assert_close(grad, want, 1e-11, name)
    along = sum((w * t).sum() for w, t in zip(wanted, tangents, strict=True))
    torch.testing.assert_close((tangent * grad_out).sum(), torch.as_tensor(along), rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("empties_hold_nan")
@pytest.mark.parametrize(("case", "offset"), FORMS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@every_build
def test_engine_is_the_reference(
    isa: str, dtype: torch.dtype, case: Case, offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    ops, tolerance, wanted = case.family.ops, TOLERANCE[dtype], truth(case, dtype, offset, 7.0)
    results: list[tuple[Tensor, ...]] = []
    for segment in SEGMENTS:
        got, saved = ops.forward(*wanted.args, 7.0, offset, segment)
        state = (case.width, *case.image, case.batch)
        assert saved.shape == saved_shape(case.depth - 2, state, offset, segment)
        if segment == 1:
            assert_close(saved, wanted.states, tolerance)
        grads = ops.backward(wanted.grad_out, *wanted.args, saved, 7.0, offset, segment, True, True)
        results.append((got, *grads))
    for name, result, want in zip(("out", *NAMES), results[0], (wanted.out, *wanted.grads), strict=True):
        assert result.isfinite().all(), name
        assert result.dtype == dtype
        assert_close(result, want, tolerance, name)
    for segment, other in zip(SEGMENTS[1:], results[1:], strict=True):
        for name, a, b in zip(("out", *NAMES), results[0], other, strict=True):
            assert torch.equal(a, b), f"{name} changes with segment {segment}"
    for tangents, want in zip(wanted.tangents, wanted.jvps, strict=True):
        assert_close(ops.jvp(*wanted.args, *tangents, 7.0, offset), want, tolerance, "jvp")
    directions = zip((wanted.grad_out_t, None), wanted.tangents, wanted.second, strict=True)
    for grad_out_t, tangents, wants in directions:
        both = [
            ops.backward_jvp(wanted.grad_out, grad_out_t, *wanted.args, *tangents, 7.0, offset, *need)
            for need in ((True, True), (True, False), (False, True))
        ]
        for name, result, want in zip(NAMES, both[0], wants, strict=True):
            assert_close(result, want, tolerance, f"second derivative for {name}")
        assert torch.equal(both[1][0], both[0][0])
        assert not any(t.numel() for t in (*both[1][1:], both[2][0]))
        for name, result, want in zip(NAMES[1:], both[2][1:], both[0][1:], strict=True):
            assert torch.equal(result, want), name


@functools.cache
def _few(width: int, offset: bool, batch: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Any]:
    """Arguments, tangents, a gradient; and output, gradients and tangent of the reference in float64."""
    case = Case(width - 2, 1, 67, batch) if width > 2 else Case(1, 1, 67, batch, hidden=width)
    args = arguments(case, torch.float64, offset)
    tangents = tuple(torch.randn_like(t) for t in args)
    grad_out = torch.randn(batch, 1, dtype=torch.float64)
    reference = case.family.reference
    out, states = reference.forward(*args, 3.0, offset, 0)
    grads = reference.backward(grad_out, *args, states, 3.0, offset, 0, True, True)
    return args, tangents, grad_out, (out, *grads, reference.jvp(*args, *tangents, 3.0, offset))


@pytest.mark.usefixtures("empties_hold_nan")
@pytest.mark.parametrize(("width", "offset"), [*((n, True) for n in range(3, 14)), *((n, False) for n in range(2, 14))])
@every_build
def test_few_samples_of_any_narrow_width(
    isa: str, width: int, offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lanes over units up to some number of samples, over samples from the next on."""
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    for batch, (dtype, tolerance) in itertools.product((1, 2, 3, 4, 5, 8, 9), TOLERANCE.items()):
        args, tangents, grad_out, wanted = _few(width, offset, batch)
        given, along, ops = tuple(t.to(dtype) for t in args), grad_out.to(dtype), MLP_CASES[0].family.ops
        results = []
        for segment in (0, 1, 10, 100):
            out, saved = ops.forward(*given, 3.0, offset, segment)
            grads = ops.backward(along, *given, saved, 3.0, offset, segment, True, True)
            results.append((out, *grads, ops.jvp(*given, *(t.to(dtype) for t in tangents), 3.0, offset)))
            alone = ops.backward(along, *given, saved, 3.0, offset, segment, True, False)[0]
            assert torch.equal(alone, grads[0])
        for name, *same, want in zip(("out", *NAMES, "jvp"), *results, wanted, strict=True):
            # In plain form terms of a sum cancel, by another factor for another seed.
            assert_close(same[0], want, 5 * tolerance, f"{name}, batch {batch}")
            assert all(torch.equal(same[0], other) for other in same[1:]), name


def _cases(filters: st.SearchStrategy, images: st.SearchStrategy, widest: int, largest: int) -> st.SearchStrategy:
    return st.builds(
        Case,
        inputs=st.integers(1, widest),
        outputs=st.integers(1, widest),
        depth=st.integers(2, 70),
        batch=st.integers(0, largest),
        filter=filters,
        image=images,
        hidden=st.none(),  # else hypothesis makes one up from the annotation
    )


ANY_MLP = _cases(st.none(), st.just(()), 40, 150)
ANY_CONV = _cases(st.sampled_from([1, 3, 5, 7]), st.tuples(st.integers(1, 10), st.integers(1, 10)), 5, 40)


@pytest.mark.parametrize("cases", [ANY_MLP, ANY_CONV], ids=["mlp", "conv"])
@settings(max_examples=50)
@given(data=st.data(), offset=st.booleans(), segment=st.integers(0, 80), isa=st.sampled_from(ISAS))
def test_any_shape(cases: st.SearchStrategy[Case], data: st.DataObject, offset: bool, segment: int, isa: str) -> None:
    case = data.draw(cases)
    ops, reference = case.family.ops, case.family.reference
    args = arguments(case, torch.float64, offset)
    tangents = tuple(torch.randn_like(t) for t in args)
    grad_out = torch.randn(case.batch, case.outputs, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NARROWDEEP_ISA", isa)
        out, saved = ops.forward(*args, 2.0, offset, segment)
        grads = ops.backward(grad_out, *args, saved, 2.0, offset, segment, True, True)
        tangent = ops.jvp(*args, *tangents, 2.0, offset)
    expected, states = reference.forward(*args, 2.0, offset, segment)
    wanted = reference.backward(grad_out, *args, states, 2.0, offset, segment, True, True)
    assert_close(out, expected, 1e-11)
    assert_close(tangent, reference.jvp(*args, *tangents, 2.0, offset), 1e-10)
    for name, grad, want in zip(NAMES, grads, wanted, strict=True):
        assert_close(grad, want, 1e-10, name)


@every_build
@pytest.mark.parametrize("case", [Case(1, 1, 4000, 3), Case(1, 1, 1000, 2, 3, (2, 2))], ids=str)
def test_float32_adds_up_thousands_of_small_terms(case: Case, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The right unit alone, every hidden weight 1 + d: f = C ((1 + d)^(L-2) - 1) and df/db_j = (1 + d)^(L-3-j)."""
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    hidden, scale, growth = case.depth - 2, 50000.0, 2.0**-20
    args = tuple(torch.zeros_like(t) for t in arguments(case, torch.float32, True))
    centre: tuple[Any, ...] = tuple(size // 2 for size in case.tap)
    right = (slice(None), 2, 2, *centre)
    args[3][right] = growth
    out, saved = case.family.ops.forward(*args, scale, True, 32)
    expected = scale * math.expm1(hidden * math.log1p(growth))
    assert out.flatten().tolist() == pytest.approx([expected] * case.batch, rel=2e-7)
    ones = torch.ones(case.batch, 1)
    grads = case.family.ops.backward(ones, *args, saved, scale, True, 32, True, True)
    powers = torch.log1p(torch.tensor(growth, dtype=torch.float64)) * torch.arange(hidden - 1, -1, -1)
    # Of the growth alone: it is what plain float32 loses.
    torch.testing.assert_close(grads[4][:, 2].double() / case.batch - 1, powers.expm1(), rtol=0, atol=2e-7)


@both_families
@pytest.mark.parametrize(("need_input", "need_params"), [(True, False), (False, True), (False, False)])
def test_what_is_not_needed_is_empty_and_changes_nothing(case: Case, need_input: bool, need_params: bool) -> None:
    ops, args = case.family.ops, arguments(case, torch.float32, True)
    grad_out = torch.randn(case.batch, case.outputs)
    for segment in (0, 8):
        _, saved = ops.forward(*args, 7.0, True, segment)
        full = ops.backward(grad_out, *args, saved, 7.0, True, segment, True, True)
        part = ops.backward(grad_out, *args, saved, 7.0, True, segment, need_input, need_params)
        for i, (a, b) in enumerate(zip(part, full, strict=True)):
            assert torch.equal(a, b) if (need_params if i else need_input) else a.shape == (0,)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 50, 700),
        Case(2, 1, 50, 333),
        Case(12, 10, 20, 200),
        Case(64, 10, 9, 200),
        Case(1, 2, 20, 150, 3, (5, 5)),
        Case(2, 13, 8, 75, 3, (6, 5)),
        Case(149, 370, 3, 70),
    ],
    ids=str,
)
def test_gradients_are_the_same_in_every_run(case: Case, count: int) -> None:
    torch.set_num_threads(count)
    ops, args = case.family.ops, arguments(case, torch.float32, True)
    grad_out = torch.randn(case.batch, case.outputs)
    out, saved = ops.forward(*args, 7.0, True, 8)
    first = ops.backward(grad_out, *args, saved, 7.0, True, 8, True, True)
    for _ in range(5):
        assert torch.equal(out, ops.forward(*args, 7.0, True, 8)[0])
        again = ops.backward(grad_out, *args, saved, 7.0, True, 8, True, True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


BAD = pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
SPOILED = [
    Case(1, 1, 6, 5),
    Case(4, 4, 6, 5),
    Case(64, 10, 6, 5),
    Case(1, 1, 6, 5, 3, (4, 4)),
    Case(2, 13, 6, 19, 3, (4, 4)),
]


@BAD
@every_build
@pytest.mark.parametrize("case", SPOILED, ids=str)
def test_a_bad_sample_spoils_what_it_spoils_in_eager_layers(
    case: Case, isa: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    ops, args = case.family.ops, arguments(case, torch.float64, False)
    args[0][3].view(-1)[-1] = bad
    leaves = tuple(t.clone().requires_grad_() for t in args)
    wanted = eager(case.family, leaves, 1.0, False)
    wanted_grads = torch.autograd.grad(wanted.sum(), leaves)
    out, saved = ops.forward(*args, 1.0, False, 4)
    torch.testing.assert_close(out, wanted, equal_nan=True)
    assert not out[3].isfinite().all()
    grads = ops.backward(torch.ones_like(out), *args, saved, 1.0, False, 4, True, True)
    others = [0, 1, 2, 4]  # their outputs and gradients are theirs alone
    assert out[others].isfinite().all()
    assert_close(grads[0][others], wanted_grads[0][others], 1e-11)
    for name, grad, want in zip(NAMES, grads, wanted_grads, strict=True):
        assert torch.equal(grad.isfinite(), want.isfinite()), name


@BAD
@every_build
@pytest.mark.parametrize("case", SPOILED, ids=str)
def test_a_bad_sample_is_seen_in_offset_form(case: Case, isa: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    ops, args = case.family.ops, arguments(case, torch.float64, True)
    args[0][3].view(-1)[-1] = bad
    out, saved = ops.forward(*args, 5.0, True, 4)
    wanted = eager(case.family, args, 5.0, True)
    others = [0, 1, 2, 4]
    assert_close(out[others], wanted[others], 1e-11)
    assert not out[3].isfinite().any()
    grads = ops.backward(torch.ones_like(out), *args, saved, 5.0, True, 4, True, True)
    assert grads[0][others].isfinite().all()


@both_families
@every_build
def test_a_bad_parameter_spoils_every_sample(case: Case, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    for i in range(1, 7):
        args = arguments(case, torch.float32, True)
        args[i].view(-1)[-1] = float("nan")
        out, _ = case.family.ops.forward(*args, 5.0, True, 4)
        assert out[:, -1].isnan().all(), NAMES[i]


@both_families
@pytest.mark.parametrize("segment", [0, 1, 8])
def test_opcheck(case: Case, segment: int) -> None:
    ops, args = case.family.ops, arguments(case, torch.float64, True)
    tests, raw = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"), ops.raw
    settings = (3.0, True, case.outputs, 0)
    torch.library.opcheck(raw.forward, (*args, *settings, segment), test_utils=tests)
    out, saved = ops.forward(*args, 3.0, True, segment)
    torch.library.opcheck(raw.backward, (out, *args, saved, *settings, segment, True, True), test_utils=tests)
    if segment == 0:
        torch.library.opcheck(raw.jvp, (*args, *args, *settings), test_utils=tests)
        some = (None, *args[1:4], None, *args[5:])
        torch.library.opcheck(raw.jvp, (*args, *some, *settings), test_utils=tests)
        for grad_t, tangents in ((out, args), (None, some)):
            second = (out, grad_t, *args, *tangents, *settings, True, True)
            torch.library.opcheck(raw.backward_jvp, second, test_utils=tests)


def _permuted(t: Tensor) -> Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def _expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


def _sliced(t: Tensor) -> Tensor:
    return t.repeat_interleave(2, 0)[::2]


@both_families
@every_build
@pytest.mark.parametrize("layout", [_permuted, _expanded, _sliced])
def test_inputs_need_not_be_contiguous(case: Case, isa: str, layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    ops = case.family.ops
    args = tuple(layout(t) for t in arguments(case, torch.float64, True))
    tangents = tuple(layout(torch.randn_like(t)) for t in args)
    grad_out = layout(torch.randn(case.batch, case.outputs, dtype=torch.float64))
    assert not any(t.is_contiguous() for t in (args[0], args[1], args[3], tangents[3]))
    plain = tuple(t.contiguous() for t in args)
    out, saved = ops.forward(*args, 3.0, True, 2)
    want, states = ops.forward(*plain, 3.0, True, 2)
    assert torch.equal(out, want)
    assert torch.equal(saved, states)
    grads = ops.backward(grad_out, *args, _permuted(saved), 3.0, True, 2, True, True)
    wanted = ops.backward(grad_out.contiguous(), *plain, states, 3.0, True, 2, True, True)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted, strict=True))
    tangent = ops.jvp(*args, *tangents, 3.0, True)
    assert torch.equal(tangent, ops.jvp(*plain, *(t.contiguous() for t in tangents), 3.0, True))


@both_families
def test_arguments_are_left_as_they_were(case: Case) -> None:
    ops, args = case.family.ops, arguments(case, torch.float32, True)
    before = tuple(t.clone() for t in args)
    out, saved = ops.forward(*args, 3.0, True, 8)
    kept = saved.clone()
    ops.backward(out, *args, saved, 3.0, True, 8, True, True)
    ops.jvp(*args, *args, 3.0, True)
    ops.backward_jvp(out, out, *args, *args, 3.0, True, True, True)
    assert all(torch.equal(a, b) for a, b in zip((*args, saved), (*before, kept), strict=True))


@both_families
def test_the_engine_checks_what_it_is_given(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In C++ as well: a wrong shape there would be read past its end."""
    ops, args = case.family.ops, arguments(case, torch.float32, True)
    width, dims = case.width, len(args[0].shape)
    with pytest.raises(RuntimeError, match=f"x must have {dims} dimensions, got {dims - 1}"):
        ops.forward(args[0][0], *args[1:], 1.0, True, 4)
    with pytest.raises(RuntimeError, match=f"first_weight must have size {case.inputs - 1} in dimension 1"):
        ops.forward(args[0][:, 1:], *args[1:], 1.0, True, 4)
    with pytest.raises(RuntimeError, match=f"hidden_weight must have size {width} in dimension 2, got {width - 1}"):
        ops.forward(*args[:3], args[3][:, :, 1:], *args[4:], 1.0, True, 4)
    with pytest.raises(RuntimeError, match=f"hidden_bias must have size {case.depth - 2} in dimension 0"):
        ops.forward(*args[:4], args[4][1:], *args[5:], 1.0, True, 4)
    with pytest.raises(RuntimeError, match="last_bias must have the dtype of x"):
        ops.forward(*args[:6], args[6].double(), 1.0, True, 4)
    with pytest.raises(RuntimeError, match="x must be float32 or float64"):
        ops.forward(*(t.half() for t in args), 1.0, True, 4)
    with pytest.raises(RuntimeError, match="segment must be at least 0, got -1"):
        ops.forward(*args, 1.0, True, -1)
    _, saved = ops.forward(*args, 1.0, True, 1)
    with pytest.raises(RuntimeError, match="saved must have size 19 in dimension 0, got 39"):
        ops.backward(torch.ones(case.batch, case.outputs), *args, saved, 1.0, True, 2, True, True)
    with pytest.raises(RuntimeError, match=f"grad_out must have size {case.batch} in dimension 0, got 1"):
        ops.backward(torch.ones(1, case.outputs), *args, saved, 1.0, True, 1, True, True)
    with pytest.raises(RuntimeError, match="hidden_bias_t must have the shape of its primal"):
        ops.jvp(*args, *args[:4], args[4][1:], None, None, 1.0, True)
    out = torch.ones(case.batch, case.outputs)
    with pytest.raises(RuntimeError, match="grad_out_t must have the shape of its primal"):
        ops.backward_jvp(out, out[1:], *args, *args, 1.0, True, True, True)
    with pytest.raises(RuntimeError, match=f"grad_out must have size {case.batch} in dimension 0, got 1"):
        ops.backward_jvp(out[:1], None, *args, *args, 1.0, True, True, True)
    with pytest.raises(RuntimeError, match="hidden_weight_t must have the dtype of x"):
        ops.backward_jvp(out, None, *args, *args[:3], args[3].double(), *[None] * 3, 1.0, True, True, True)
    monkeypatch.setenv("NARROWDEEP_ISA", "mmx")
    with pytest.raises(RuntimeError, match="NARROWDEEP_ISA must be one of .*scalar on this machine, got mmx"):
        ops.forward(*args, 1.0, True, 4)
