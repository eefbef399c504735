"""The tangent kernel ops: reference and every build of the engine against the explicit Jacobian of eager layers."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowdeep.ops import engine
from narrowdeep.ops.gram import op, reference
from tests.ops.chains import Case, arguments, assert_close, double, eager

ISAS = engine.instruction_sets()
SCALE = 7.0
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
MASKS = (reference.ALL_TRAINABLE, 0b010110, 0b101001, 0b001000, 0)

# A case and N2; the case's batch is N1.
PAIRS = [
    (Case(1, 1, 129, 20), 37),  # the sum of a segment's layers is divided
    (Case(2, 1, 2, 1), 1),  # no hidden layer
    (Case(2, 1, 3, 5), 0),
    (Case(2, 1, 70, 70), 3),  # moved twice
    (Case(3, 2, 40, 0), 17),
    (Case(5, 3, 34, 33), 65),
    (Case(9, 4, 20, 5), 40),
    (Case(2, 1, 20, 9, hidden=9), 2),
    (Case(2, 5, 10, 3, hidden=3), 8),  # more outputs than hidden units
    (Case(1, 1, 40, 20, 3, (7, 7)), 3),  # the thesis's network
    (Case(1, 1, 2, 1, 3, (3, 4)), 1),
    (Case(2, 3, 70, 5, 5, (3, 2)), 17),  # a segment is divided into groups
    (Case(1, 1, 3, 2, 7, (2, 3)), 0),  # the filter is larger than the image
    (Case(1, 1, 129, 3, 1, (2, 2)), 2),
    (Case(3, 4, 6, 9, 3, (1, 1)), 20),
    (Case(2, 9, 5, 17, 3, (2, 5)), 5),  # 12 channels
    (Case(1, 1, 5, 0, 3, (3, 3)), 4),
    (Case(3, 5, 6, 4, 3, (3, 3), hidden=2), 3),
]


class Truth(NamedTuple):
    x1: Tensor
    x2: Tensor
    params: tuple[Tensor, ...]
    jacobians: tuple[tuple[Tensor, ...], tuple[Tensor, ...]]  # of x1 and of x2: (N, out, size) of each parameter


@cache  # every build is held against the same truth
def truth(case: Case, columns: int, dtype: torch.dtype, offset: bool) -> Truth:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, *params = arguments(case._replace(batch=case.batch + columns), dtype, offset)

    def outputs(sample: Tensor, *weights: Tensor) -> Tensor:
        return eager(case.family, (sample[None], *weights), SCALE, offset)[0]

    def jacobians(samples: Tensor) -> tuple[Tensor, ...]:
        if len(samples) == 0:
            return tuple(torch.empty(0, case.outputs, p.numel(), dtype=torch.float64) for p in params)
        jacobian = torch.func.jacrev(outputs, argnums=tuple(range(1, 7)))
        parts = torch.func.vmap(jacobian, (0, *(None for _ in params)))(samples.double(), *double(tuple(params)))
        return tuple(part.flatten(2) for part in parts)

    x1, x2 = x[: case.batch], x[case.batch :]
    return Truth(x1, x2, tuple(params), (jacobians(x1), jacobians(x2)))


def product(t: Truth, symmetric: bool, trainable: int) -> Tensor:
    """(N1, N2, out, out) from the Jacobians of the parameters that count."""
    left, right = t.jacobians[0], t.jacobians[0 if symmetric else 1]
    parts = [
        torch.einsum("iap,jbp->ijab", a, b)
        for bit, (a, b) in enumerate(zip(left, right, strict=True))
        if trainable >> bit & 1
    ]
    outputs = left[0].shape[1]
    return sum(parts, left[0].new_zeros(len(left[0]), len(right[0]), outputs, outputs))


def cases() -> list:
    return [
        pytest.param(case, columns, offset, id=f"{case} x{columns} {'offset' if offset else 'plain'}")
        for case, columns in PAIRS
        for offset in (True, False)
        if not (offset and case.hidden)
    ]


def check(gram, case: Case, columns: int, dtype: torch.dtype, offset: bool) -> None:
    t = truth(case, columns, dtype, offset)
    size = float(product(t, case.batch * columns == 0, reference.ALL_TRAINABLE).abs().max()) if case.batch else 1.0
    for symmetric in (False, True):
        for trainable in MASKS:
            expected = product(t, symmetric, trainable)
            for reduce in (reference.FULL, reference.TRACE, reference.DIAGONAL):
                if reduce != reference.FULL and trainable not in MASKS[:2]:
                    continue
                second = t.x1 if symmetric else t.x2
                got = gram(t.x1, second, *t.params, SCALE, offset, symmetric, trainable, reduce)
                want = reference.reduced(expected, reduce)
                assert got.dtype == torch.float64
                assert got.shape == want.shape
                # Relative to the whole kernel: a frozen part may be far smaller than what its layers pass on.
                torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype] * size)
                if symmetric:
                    mirrored = got.transpose(0, 1)
                    assert torch.equal(got, mirrored.transpose(2, 3) if reduce == reference.FULL else mirrored)


@pytest.mark.parametrize(("case", "columns", "offset"), cases())
def test_reference_is_the_product_of_explicit_jacobians(case: Case, columns: int, offset: bool) -> None:
    def gram(*args) -> Tensor:
        return reference.gram(reference.CNN if case.filter else reference.MLP, *args)

    check(gram, case, columns, torch.float64, offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("case", "columns", "offset"), cases())
@pytest.mark.parametrize("isa", ISAS)
def test_engine_is_the_product_of_explicit_jacobians(
    isa: str, case: Case, columns: int, offset: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    check(op.cnn_gram if case.filter else op.mlp_gram, case, columns, dtype, offset)


@settings(max_examples=40)
@given(
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    depth=st.integers(2, 40),
    rows=st.integers(0, 20),
    columns=st.integers(0, 20),
    filter=st.sampled_from([None, 1, 3, 5]),
    image=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    offset=st.booleans(),
    symmetric=st.booleans(),
    trainable=st.integers(0, 63),
    reduce=st.integers(0, 2),
    isa=st.sampled_from(ISAS),
)
def test_any_shape(
    inputs, outputs, depth, rows, columns, filter, image, offset, symmetric, trainable, reduce, isa
) -> None:
    case = Case(inputs, outputs, depth, rows + columns, filter, image if filter else ())
    x, *params = arguments(case, torch.float64, offset)
    x1, x2 = x[:rows], x[:rows] if symmetric else x[rows:]
    every: tuple[Any, ...] = (x1, x2, *params, SCALE, offset, symmetric, trainable, reduce)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NARROWDEEP_ISA", isa)
        got = (op.cnn_gram if filter else op.mlp_gram)(*every)
    assert_close(got, reference.gram(reference.CNN if filter else reference.MLP, *every), 1e-12)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("case", [Case(2, 2, 90, 150), Case(1, 2, 20, 50, 3, (5, 5))], ids=str)
def test_threads_change_nothing(case: Case) -> None:
    x, *params = arguments(case, torch.float32, True)
    gram = op.cnn_gram if case.filter else op.mlp_gram
    results = []
    for count in (1, 2, 2, 3):
        torch.set_num_threads(count)
        results.append(gram(x, x, *params, SCALE, True, True, reference.ALL_TRAINABLE, reference.FULL))
    assert torch.equal(results[1], results[2])
    for other in results[1:]:
        assert_close(other, results[0], 1e-6)


@pytest.mark.parametrize("case", [Case(2, 2, 9, 4), Case(1, 2, 5, 4, 3, (3, 2))], ids=str)
def test_inputs_need_not_be_contiguous(case: Case) -> None:
    x, *params = arguments(case, torch.float64, True)
    gram = op.cnn_gram if case.filter else op.mlp_gram
    settings = (SCALE, True, False, reference.ALL_TRAINABLE, reference.FULL)
    want = gram(x, x[:3], *params, *settings)
    strided = [torch.stack((t, t), -1)[..., 0] for t in (x, x[:3], *params)]
    assert not any(t.is_contiguous() for t in strided)
    assert torch.equal(gram(*strided, *settings), want)


@pytest.mark.parametrize("case", [Case(2, 1, 5, 4), Case(1, 1, 5, 4, 3, (3, 3))], ids=str)
def test_bad_arguments_are_refused(case: Case) -> None:
    x, *params = arguments(case, torch.float32, True)
    gram = op.cnn_gram if case.filter else op.mlp_gram
    every = reference.ALL_TRAINABLE
    with pytest.raises(RuntimeError, match="x2 must have size .* in dimension 1, got"):
        gram(x, torch.cat((x, x), 1), *params, SCALE, True, False, every, 0)
    with pytest.raises(RuntimeError, match="x2 must have the dtype of x"):
        gram(x, x.double(), *params, SCALE, True, False, every, 0)
    with pytest.raises(RuntimeError, match="reduce must be 0, 1 or 2, got 3"):
        gram(x, x, *params, SCALE, True, True, every, 3)
