"""Span ops of the engine: a chain cut anywhere is the chain in one op, bit for bit, and float64 autograd of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name torch's own documentation uses)

from narrowdeep.ops import engine
from narrowdeep.ops.cnn import op as _cnn_op  # noqa: F401 (defines the ops)
from narrowdeep.ops.mlp import op as _mlp_op  # noqa: F401

PERIOD = 32
"""Layers between two renormalisations."""

Params = tuple[Tensor | None, ...]
NAMES = ("input", "first_weight", "first_bias", "hidden_weight", "hidden_bias", "last_weight", "last_bias")
TOLERANCE = {torch.float32: 3e-5, torch.float64: 1e-11}


class Case(NamedTuple):
    """Sizes of one chain of ``layers`` hidden layers; a convolution chain where there is a filter."""

    inputs: int
    outputs: int
    layers: int
    batch: int
    filter: int | None = None
    image: tuple[int, ...] = ()
    hidden: int | None = None  # width in plain form; None is in + 1 + out

    @property
    def family(self) -> str:
        return "cnn" if self.filter else "mlp"

    @property
    def width(self) -> int:
        return self.hidden or self.inputs + 1 + self.outputs

    @property
    def tap(self) -> tuple[int, ...]:
        return (self.filter, self.filter) if self.filter else ()


CASES = [
    Case(2, 1, 65, 57),  # in registers
    Case(1, 1, 33, 17),
    Case(4, 3, 33, 1),
    Case(12, 10, 33, 9),
    Case(64, 10, 5, 37),
    Case(1, 1, 33, 17, 3, (3, 4)),
    Case(2, 2, 33, 9, 5, (3, 2)),
    Case(1, 1, 4, 3, 3, (9, 8)),
]
PLAIN = [Case(3, 2, 33, 20, hidden=1), Case(2, 9, 33, 37, hidden=9), Case(3, 3, 33, 5, 3, (2, 3), hidden=2)]
FORMS = [(case, True) for case in CASES] + [(case, False) for case in CASES + PLAIN]

forms = pytest.mark.parametrize(("case", "offset"), FORMS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
every_build = pytest.mark.parametrize("isa", engine.instruction_sets())
SCALE = 7.0


@pytest.fixture(autouse=True)
def _empties_hold_nan() -> Iterator[None]:
    """What an op leaves unwritten in its results does not pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def _op(case: Case, name: str) -> Callable[..., Any]:
    return getattr(torch.ops.narrowdeep, f"{case.family}_{name}").default


def _arguments(case: Case, dtype: torch.dtype, offset: bool) -> tuple[Tensor, ...]:
    """x and the six parameters, scaled so that neither states nor gradients explode."""
    n, tap = case.width, case.tap
    std = (0.03 if offset else 1.4) / (n * (case.filter or 1) ** 2) ** 0.5
    tensors = (
        torch.randn(case.batch, case.inputs, *case.image),
        torch.randn(n, case.inputs, *tap),
        torch.randn(n) * 0.1,
        torch.randn(case.layers, n, n, *tap) * std,
        torch.randn(case.layers, n) * 0.1,
        torch.randn(case.outputs, n, *tap),
        torch.randn(case.outputs),
    )
    return tuple(t.to(dtype) for t in tensors)


class Span(NamedTuple):
    """One piece of a chain as the ops take it."""

    params: Params
    start: int

    @property
    def first(self) -> bool:
        return self.params[0] is not None

    @property
    def last(self) -> bool:
        return self.params[4] is not None


def _cut(params: tuple[Tensor, ...], lengths: tuple[int, ...]) -> list[Span]:
    """Spans of so many hidden layers each, the ends with the outer ones."""
    w1, b1, wh, bh, wl, bl = params
    assert sum(lengths) == wh.shape[0]
    ends = list(pairwise((0, *accumulate(lengths))))
    spans = []
    for i, (begin, end) in enumerate(ends):
        first = (w1, b1) if i == 0 else (None, None)
        last = (wl, bl) if i == len(ends) - 1 else (None, None)
        spans.append(Span((*first, wh[begin:end], bh[begin:end], *last), begin))
    return spans


def _settings(case: Case, offset: bool, start: int) -> tuple[Any, ...]:
    return SCALE, offset, case.outputs, start


class Result(NamedTuple):
    output: Tensor
    states: list[Tensor]
    """At the borders."""
    grads: tuple[Tensor, ...]
    gradients: list[Tensor]
    """At the borders."""


def _run(
    case: Case, args: tuple[Tensor, ...], offset: bool, lengths: tuple[int, ...], segment: int, grad: Tensor
) -> Result:
    """Forward and backward through spans."""
    spans, value, kept = _cut(args[1:], lengths), args[0], []
    for span in spans:
        output, saved = _op(case, "forward")(value, *span.params, *_settings(case, offset, span.start), segment)
        assert tuple(saved.shape) == _saved_shape(case, offset, span, segment)
        assert saved.isfinite().all()
        kept.append((value, saved))
        value = output
    result, collected, gradients = value, [], []
    for span, (before, saved) in zip(reversed(spans), reversed(kept), strict=True):
        arguments = (grad, before, *span.params, saved, *_settings(case, offset, span.start), segment)
        grad, *grads = _op(case, "backward")(*arguments, True, True)
        alone, *none = _op(case, "backward")(*arguments, True, False)
        assert torch.equal(alone, grad)
        assert all(t.shape == (0,) for t in none)
        absent, *same = _op(case, "backward")(*arguments, False, True)
        assert absent.shape == (0,)
        assert all(torch.equal(a, b) for a, b in zip(same, grads, strict=True))
        for p, g in zip(span.params, grads, strict=True):
            assert g.shape == ((0,) if p is None else p.shape)
        collected.append(grads)
        gradients.append(grad)
    collected.reverse()
    hidden = (torch.cat([g[i] for g in collected]) for i in (2, 3))
    every = (grad, collected[0][0], collected[0][1], *hidden, collected[-1][4], collected[-1][5])
    return Result(result, [before for before, _ in kept[1:]], every, gradients[-2::-1])


def _saved_shape(case: Case, offset: bool, span: Span, segment: int) -> tuple[int, ...]:
    """Written out state by state: which states a span of m layers saves."""
    m = span.params[2].shape[0]  # type: ignore[union-attr]
    if segment == 0:
        rows: list[int] = []
    elif segment == 1:
        rows = [j for j in range(m + 1) if (j > 0 or span.first) and (j < m or span.last)]
    else:
        rows = [j for j in range(max(m, 1)) if j % segment == 0 and (j > 0 or span.first)]
    return (len(rows), 2 if offset and segment > 1 else 1, case.width, *case.image, case.batch)


def _affine(case: Case, weight: Tensor, bias: Tensor, h: Tensor) -> Tensor:
    """Batch first."""
    return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2) if case.filter else F.linear(h, weight, bias)


def _identity(case: Case, rows: int, columns: int, pairs: list[tuple[int, int]], value: float) -> Tensor:
    weight = torch.zeros(rows, columns, *case.tap, dtype=torch.float64)
    for i, j in pairs:
        centre: tuple[Any, ...] = (i, j, *(size // 2 for size in case.tap))
        weight[centre] = value
    return weight


def _plain(case: Case, offset: bool, span: Span, value: Tensor, params: Params) -> Tensor:
    """A span in eager layers in float64: x or the value of a state, batch first, to the outputs or a state's value."""
    w1, b1, wh, bh, wl, bl = params
    n, left, right = case.width, range(case.inputs), case.width - case.outputs
    h = value
    keep = [(i, i) for i in range(n) if i != case.inputs] if offset else []
    if w1 is not None:
        assert b1 is not None
        if offset:
            w1 = w1 + _identity(case, n, case.inputs, [(i, i) for i in left], SCALE)
            b1 = b1 + torch.tensor([0.0] * right + [SCALE] * case.outputs, dtype=torch.float64)
        h = torch.relu(_affine(case, w1, b1, h))
    assert wh is not None
    assert bh is not None
    for weight, bias in zip(wh, bh, strict=True):
        h = torch.relu(_affine(case, weight + _identity(case, n, n, keep, 1.0), bias, h))
    if wl is None:
        return h
    assert bl is not None
    if offset:
        wl, bl = wl + _identity(case, case.outputs, n, [(i, right + i) for i in range(case.outputs)], 1.0), bl - SCALE
    z = _affine(case, wl, bl, h)
    return z.flatten(2).mean(2) if case.filter else z


def _whole(state: Tensor) -> Tensor:
    """The value of a state, (base + hi) + lo in float64, batch first."""
    return state.double().sum(0).movedim(-1, 0)


def _assert_close(actual: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    """Relative to the largest entry: an entry is a sum of terms of that size."""
    assert actual.shape == expected.shape, name
    size = max(float(expected.abs().max()) if expected.numel() else 1.0, 1e-30)
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=0, atol=tolerance * size, msg=lambda text: f"{name}: {text}"
    )


def _equal(a: Result, b: Result, skip_hidden: bool = False) -> None:
    assert torch.equal(a.output, b.output)
    for name, x, y in zip(NAMES, a.grads, b.grads, strict=True):
        assert torch.equal(x, y), name


def _cuts(layers: int) -> list[tuple[int, ...]]:
    """Lengths of spans; 0 is the first or the last layer alone."""
    cuts = [(0, layers), (layers, 0), (0, layers, 0), (layers // 2, layers - layers // 2), (1, 0, layers - 1)]
    if layers > PERIOD:
        cuts += [(PERIOD - 1, layers + 1 - PERIOD), (PERIOD, layers - PERIOD), (0, PERIOD, layers - PERIOD)]
    return [cut for cut in cuts if all(cut[i] for i in range(1, len(cut) - 1))]  # an inner span has a layer


@dtypes
@forms
@every_build
def test_a_chain_cut_anywhere_is_the_chain(
    isa: str, case: Case, offset: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    args, grad = _arguments(case, dtype, offset), torch.randn(case.batch, case.outputs, dtype=dtype)
    whole = _run(case, args, offset, (case.layers,), 2, grad)
    leaves = tuple(t.double().requires_grad_() for t in args)
    expected = _plain(case, offset, Span(leaves[1:], 0), leaves[0], leaves[1:])
    wanted = torch.autograd.grad(expected, leaves, grad.double(), materialize_grads=True)
    _assert_close(whole.output, expected.detach(), TOLERANCE[dtype], "output")
    for name, got, want in zip(NAMES, whole.grads, wanted, strict=True):
        assert got.isfinite().all(), name
        _assert_close(got, want, TOLERANCE[dtype], name)
    for lengths in _cuts(case.layers):
        for segment in (0, 1, 2, 5, case.layers + 3):
            _equal(_run(case, args, offset, lengths, segment, grad), whole)


@pytest.mark.parametrize("start", [0, 1, 31, 32, 1000])
@pytest.mark.parametrize("layers", [0, 1, 31, 32, 33, 65])
@pytest.mark.parametrize(("first", "last"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(
    ("case", "offset"),
    [
        (Case(2, 1, 0, 17), True),
        (Case(5, 4, 0, 9), True),
        (Case(1, 2, 0, 9, 3, (2, 3)), True),
        (Case(2, 2, 0, 5), False),
        (Case(1, 2, 0, 9, 3, (2, 3)), False),
    ],
    ids=str,
)
def test_a_span_is_plain_torch(
    case: Case, offset: bool, first: bool, last: bool, layers: int, start: int
) -> None:
    """Values, gradients and tangents of one span from a state of any words, in float64."""
    if (first and start) or not (first or last or layers):
        pytest.skip("no such span")
    case = case._replace(layers=layers)
    x, *every = _arguments(case, torch.float64, offset)
    params = [p if keep else None for p, keep in zip(every, (first, first, True, True, last, last), strict=True)]
    span = Span(tuple(params), start)
    words, middle = 3 if offset else 1, case.width - case.outputs - 1  # no word but lo where there is no identity part
    state = (words, case.width, *case.image, case.batch)
    value = x
    if not first:  # a state is not negative, and one of its units is exactly 0
        value = torch.rand(state, dtype=torch.float64) + 1
        value[:, 0, ..., 0] = 0
        if offset:
            value[:2, middle] = 0
            value[0, middle + 1 :] = SCALE
    output, saved = _op(case, "forward")(value, *params, *_settings(case, offset, start), 3)
    inside = [value if first else _whole(value), *(p for p in params if p is not None)]
    leaves = [t.double().requires_grad_() for t in inside]

    def network(*tensors: Tensor) -> Tensor:
        given = iter(tensors[1:])
        return _plain(case, offset, span, tensors[0], tuple(None if p is None else next(given) for p in params))

    expected = network(*leaves)
    got = output if last else _whole(output)
    _assert_close(got, expected.detach(), 1e-11, "output")
    if not last and offset and not first:
        assert torch.equal(output[0], value[0])  # the base goes through
        if layers and not (start + layers) % PERIOD:
            skip = [i for i in range(case.width) if i != case.inputs]
            assert (output[2][skip].abs() <= 1e-15 * output[1][skip].abs()).all()  # renormalised: hi has it all

    # A gradient of a state is that of its pre-activation: masked, R in the right units, the same at every position.
    if last:
        grad = torch.randn(case.batch, case.outputs, dtype=torch.float64)
        along = grad
    else:
        grad = torch.randn(state, dtype=torch.float64)
        if offset:
            grad[0] = grad[1, middle] = 0
            root = torch.randn(case.outputs, *(1 for _ in case.image), case.batch, dtype=torch.float64)
            grad[0, case.width - case.outputs :] = root
        dead = output.sum(0) == 0
        grad[-1] = torch.where(dead, -grad[:-1].sum(0), grad[-1])
        along = _whole(grad)
    wanted = torch.autograd.grad(expected, leaves, along, materialize_grads=True)
    grad_input, *grads = _op(case, "backward")(
        grad, value, *params, saved, *_settings(case, offset, start), 3, True, True
    )
    if first:
        _assert_close(grad_input, wanted[0], 1e-11, "input")
    elif layers or last:  # through the ReLU of the incoming state
        assert grad_input.shape == state
        _assert_close(_whole(grad_input), wanted[0] * (leaves[0] > 0), 1e-11, "input")
        if offset and not last:
            assert torch.equal(grad_input[0], grad[0])
    present = [g for g, p in zip(grads, params, strict=True) if p is not None]
    for got_grad, want in zip(present, wanted[1:], strict=True):
        _assert_close(got_grad, want, 1e-11, str(tuple(want.shape)))

    tangents = [torch.randn_like(t) for t in (value, *(p for p in params if p is not None))]
    if not first:
        if offset:
            tangents[0][0, middle:] = tangents[0][1, middle] = 0
        tangents[0][-1] = torch.where(value.sum(0) == 0, -tangents[0][:-1].sum(0), tangents[0][-1])
    given = iter(tangents[1:])
    params_t = [None if p is None else next(given) for p in params]
    output_t = _op(case, "jvp")(value, *params, tangents[0], *params_t, *_settings(case, offset, start))
    eager_t = (tangents[0] if first else _whole(tangents[0]), *tangents[1:])
    _, expected_t = torch.autograd.functional.jvp(network, tuple(leaves), eager_t)
    _assert_close(output_t if last else _whole(output_t), expected_t, 1e-11, "tangent")
    none = _op(case, "jvp")(value, *params, *[None] * 7, *_settings(case, offset, start))
    assert not (none if last else _whole(none)).any()

    # The tangent of all gradients, along a tangent of the gradient that looks as the gradient itself does.
    grad_t = torch.randn_like(grad) if last else 2 * grad.roll(1, -1)
    if not last:
        if offset:
            grad_t[1].normal_()
            grad_t[1, middle] = 0
        grad_t[-1] = torch.where(dead, -grad_t[:-1].sum(0), grad_t[-1])

    def gradients(along: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.func.vjp(network, *tensors)[1](along)

    primals = along, *(leaf.detach() for leaf in leaves)
    directions = grad_t if last else _whole(grad_t), *eager_t
    wanted_t: Any = torch.func.jvp(gradients, primals, directions)[1]
    args = (grad, grad_t, value, *params, tangents[0], *params_t, *_settings(case, offset, start), True, True)
    input_t, *grads_t = _op(case, "backward_jvp")(*args)
    if first:
        _assert_close(input_t, wanted_t[0], 1e-11, "tangent of the input's gradient")
    elif layers or last:
        assert input_t.shape == state
        _assert_close(_whole(input_t), wanted_t[0] * (leaves[0] > 0), 1e-11, "tangent of the state's gradient")
    present = [g for g, p in zip(grads_t, params, strict=True) if p is not None]
    for got_grad, want in zip(present, wanted_t[1:], strict=True):
        _assert_close(got_grad, want, 1e-11, str(tuple(want.shape)))


@dtypes
@forms
@every_build
def test_tangents_cut_anywhere(
    isa: str, case: Case, offset: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    args = _arguments(case, dtype, offset)
    tangents = tuple(torch.randn_like(t) for t in args)
    results = []
    for lengths in [(case.layers,), *_cuts(case.layers)]:
        value, tangent = args[0], tangents[0]
        for span, span_t in zip(_cut(args[1:], lengths), _cut(tangents[1:], lengths), strict=True):
            settings = _settings(case, offset, span.start)
            tangent = _op(case, "jvp")(value, *span.params, tangent, *span_t.params, *settings)
            value, _ = _op(case, "forward")(value, *span.params, *settings, 0)
        results.append(tangent)
    assert results[0].isfinite().all()
    for other in results[1:]:
        assert torch.equal(other, results[0])


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", [Case(2, 1, 40, 700), Case(12, 10, 35, 200), Case(1, 2, 33, 150, 3, (3, 3))], ids=str)
def test_threads_and_layouts(case: Case, count: int) -> None:
    """Cut or not, with strided operands: the same bits, for one thread or two."""
    torch.set_num_threads(count)
    args, grad = _arguments(case, torch.float32, True), torch.randn(case.batch, case.outputs)
    whole = _run(case, args, True, (case.layers,), 8, grad)
    strided = tuple(t.movedim(0, -1).contiguous().movedim(-1, 0) for t in args)
    _equal(_run(case, strided, True, (20, case.layers - 20), 8, grad.t().contiguous().t()), whole)
    _equal(_run(case, args, True, (case.layers,), 8, grad), whole)


@pytest.mark.parametrize("case", [Case(2, 1, 4, 0), Case(64, 10, 4, 0), Case(1, 2, 4, 0, 3, (3, 3))], ids=str)
def test_no_samples(case: Case) -> None:
    args = _arguments(case, torch.float32, True)
    result = _run(case, args, True, (2, 2), 2, torch.randn(0, case.outputs))
    assert result.output.shape == (0, case.outputs)
    assert result.states[0].shape == (3, case.width, *case.image, 0)
    assert not any(g.any() for g in result.grads)


def _misaligned(t: Tensor) -> Tensor:
    """The same values where no element of its type may lie."""
    data = torch.zeros(t.numel() * t.element_size() + 1, dtype=torch.uint8)
    data[1:] = t.contiguous().view(-1).view(torch.uint8)
    return torch.frombuffer(data.numpy(), dtype=t.dtype, offset=1, count=t.numel()).view(t.shape)


@pytest.mark.parametrize("case", [Case(2, 1, 4, 17), Case(12, 10, 4, 9), Case(1, 2, 4, 9, 3, (3, 3))], ids=str)
def test_tensors_may_begin_anywhere_in_memory(case: Case) -> None:
    args, grad = _arguments(case, torch.float32, True), torch.randn(case.batch, case.outputs)
    moved = tuple(_misaligned(t) for t in args)
    assert all(t.data_ptr() % t.element_size() for t in moved)
    _equal(_run(case, moved, True, (2, 2), 2, _misaligned(grad)), _run(case, args, True, (4,), 2, grad))


@pytest.mark.parametrize(
    ("case", "samples"), [(Case(1, 1, 1, 0), 2**20), (Case(12, 10, 1, 0), 2**18), (Case(1, 1, 1, 0, 1, (1, 1)), 2**19)],
    ids=str,
)  # fmt: skip
def test_gradients_of_a_large_batch_are_summed_without_loss(case: Case, samples: int) -> None:
    """A million terms of one sign, added one after another in float32, lose four digits."""
    case = case._replace(batch=samples)
    args = _arguments(case, torch.float32, True)
    grad = torch.rand(samples, case.outputs) + 0.5
    _, saved = _op(case, "forward")(*args, *_settings(case, True, 0), 1)
    grads = _op(case, "backward")(grad, *args, saved, *_settings(case, True, 0), 1, True, True)
    same = _op(case, "forward")(*(t.double() for t in args), *_settings(case, True, 0), 1)[1]
    wanted = _op(case, "backward")(
        grad.double(), *(t.double() for t in args), same, *_settings(case, True, 0), 1, True, True
    )
    for name, got, want in zip(NAMES[1:], grads[1:], wanted[1:], strict=True):
        _assert_close(got, want, 5e-6, name)
    exact = grad.double().sum(0) / 1
    assert ((grads[6].double() - exact).abs() <= 3e-6 * exact).all()


@pytest.mark.parametrize("batch", [1, 13])
@every_build
def test_gradients_of_tall_images_are_summed_without_loss(
    isa: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where lanes run over output channels as well, whose sums are made a row at a time."""
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    case = Case(2, 29, 1, batch, 1, (8192, 1))
    args, found = _arguments(case, torch.float32, False), []
    grad = torch.rand(batch, case.outputs) + 0.5
    for dtype in (torch.float32, torch.float64):
        given = [t.abs().to(dtype) for t in args]  # terms of one sign
        _, saved = _op(case, "forward")(*given, *_settings(case, False, 0), 1)
        backward = _op(case, "backward")
        found.append(backward(grad.to(dtype), *given, saved, *_settings(case, False, 0), 1, True, True))
    for name, got, want in zip(NAMES, *found, strict=True):
        _assert_close(got, want, 5e-7 if "weight" in name else 2e-6, name)


BAD = [
    ({"start": -1}, "start must be from 0 to 2\\*\\*62, got -1"),
    ({"start": 2**62 + 1}, "start must be from 0 to"),
    ({"segment": -1}, "segment must be at least 0, got -1"),
    ({"outputs": 0}, "outputs must be at least 1, got 0"),
    ({"outputs": 2}, "hidden_weight must have in"),
]


@pytest.mark.parametrize("case", [Case(1, 1, 4, 5), Case(1, 1, 4, 5, 3, (3, 2))], ids=["mlp", "cnn"])
@pytest.mark.parametrize("outputs", [9, 2**62, 2**63 - 1])
def test_outputs_are_the_last_layers_in_plain_form(case: Case, outputs: int) -> None:
    """No memory is laid out for outputs that a span without the last layer does not have."""
    w1, b1, wh, bh = _arguments(case, torch.float64, False)[1:5]
    forward, backward, jvp = (_op(case, name) for name in ("forward", "backward", "jvp"))
    x = torch.rand(case.batch, case.inputs, *case.image, dtype=torch.float64)
    params = (w1, b1, wh, bh, None, None)
    found = []
    for number in (1, outputs):
        settings = (SCALE, False, number, 0)
        state, saved = forward(x, *params, *settings, 2)
        grads = backward(state, x, *params, saved, *settings, 2, True, True)
        found.append((state, saved, *grads, jvp(x, *params, x, *params, *settings)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("case", [Case(1, 1, 4, 5), Case(1, 1, 4, 5, 3, (3, 2))], ids=["mlp", "cnn"])
def test_bad_arguments_are_refused(case: Case) -> None:
    args = _arguments(case, torch.float32, True)
    forward, backward, jvp = (_op(case, name) for name in ("forward", "backward", "jvp"))
    none = (None, None)
    w1, b1, wh, bh, wl, bl = args[1:]
    state = torch.rand(3, case.width, *case.image, case.batch)
    good: dict[str, Any] = {"scale": SCALE, "offset": True, "outputs": 1, "start": 0, "segment": 2}
    for wrong, words in BAD:
        with pytest.raises(RuntimeError, match=words):
            forward(state, *none, wh, bh, *none, *{**good, **wrong}.values())
    settings = tuple(good.values())
    with pytest.raises(RuntimeError, match="start must be 0 with the first layer, got 3"):
        forward(args[0], w1, b1, wh, bh, wl, bl, SCALE, True, 1, 3, 2)
    with pytest.raises(RuntimeError, match="outputs|last_weight must have size 2"):
        forward(args[0], w1, b1, wh, bh, wl, bl, SCALE, False, 2, 0, 2)
    with pytest.raises(RuntimeError, match="first_weight and first_bias must be given together"):
        forward(args[0], w1, None, wh, bh, wl, bl, *settings)
    with pytest.raises(RuntimeError, match="last_weight and last_bias must be given together"):
        forward(args[0], w1, b1, wh, bh, None, bl, *settings)
    with pytest.raises(RuntimeError, match="a span must have at least one layer"):
        forward(state, *none, wh[:0], bh[:0], *none, *settings)
    with pytest.raises(RuntimeError, match="state must have size 3 in dimension 0, got 2"):
        forward(state[1:], *none, wh, bh, *none, *settings)
    with pytest.raises(RuntimeError, match=f"state must have size {case.width} in dimension 1"):
        forward(state[:, 1:], *none, wh, bh, *none, *settings)
    with pytest.raises(RuntimeError, match="hidden_weight must have the dtype of state"):
        forward(state, *none, wh.double(), bh, *none, *settings)
    output, saved = forward(state, *none, wh, bh, *none, *settings)
    with pytest.raises(RuntimeError, match="grad must have .* got"):
        backward(output[:, 1:], state, *none, wh, bh, *none, saved, *settings, True, True)
    with pytest.raises(RuntimeError, match="grad must have the dtype of state"):
        backward(output.double(), state, *none, wh, bh, *none, saved, *settings, True, True)
    with pytest.raises(RuntimeError, match="saved must have size 1 in dimension 0, got 0"):
        backward(output, state, *none, wh, bh, *none, saved[:0], *settings, True, True)
    with pytest.raises(RuntimeError, match="first_bias_t is the tangent of what is not given"):
        jvp(state, *none, wh, bh, *none, None, None, bh[0], *[None] * 4, *settings[:4])
    with pytest.raises(RuntimeError, match="state_t must have the shape of its primal"):
        jvp(state, *none, wh, bh, *none, state[1:], *[None] * 6, *settings[:4])
