"""Depth in parallel in plain torch, against the chain layer after layer."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from narrowdeep.ops import reference, shooting
from narrowdeep.ops.mlp.reference import linear
from narrowdeep.ops.params import Affine
from tests.gpu.cases import Case, doubled, draw, first_state, trained

F32, F64 = torch.float32, torch.float64


def last_state(case: Case, inputs: tuple[Tensor, ...], start: int) -> tuple[Tensor, Tensor]:
    """(hi, lo), layer after layer."""
    base, hi, lo = first_state(case, inputs)
    *_, (_, hi, lo) = reference.states(linear, base, hi, lo, inputs[3], inputs[4], case.out_features, True, start)
    return hi, lo


@pytest.mark.parametrize("start", [0, 17, 2**40 + 5])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("inputs", "outputs", "length"), [(1, 1, 32), (2, 1, 64), (4, 3, 96)])
def test_segments_meet_where_the_chain_goes(
    inputs: int, outputs: int, length: int, dtype: torch.dtype, start: int
) -> None:
    case = Case(inputs, outputs, 300, 9, True, dtype, 0)
    given = trained(case)
    shot = shooting.forward(linear, first_state(case, given), Affine(*given[3:5]), outputs, length, start)
    assert shot.turns.min() >= 2
    truth = torch.stack(last_state(case, doubled(given), start)).sum(0)
    kept = torch.arange(case.hidden) != inputs
    size = truth[kept].abs().max()
    chain = last_state(case, given, start)
    error, other = ((hi.double() + lo - truth)[kept].abs().max() / size for hi, lo in ((shot.hi, shot.lo), chain))
    assert error <= 2 * other + shooting.BOUND[dtype]


def test_segments_of_a_new_network_meet_in_two_turns() -> None:
    """Nothing moves but the middle unit, which no layer keeps."""
    case = Case(2, 1, 300, 9, True, F32, 0)
    x, first, first_bias, weight, bias, *_ = trained(case)
    kept = torch.arange(case.hidden) != case.in_features
    weight[:, kept], bias[:, kept] = 0, 0
    state = first_state(case, (x, first * 0, first_bias * 0))
    shot = shooting.forward(linear, state, Affine(weight, bias), 1, 64)
    assert (shot.turns == 2).all()
    *_, (_, hi, lo) = reference.states(linear, *state, weight, bias, 1, True)
    assert torch.equal(shot.hi, hi)
    assert torch.equal(shot.lo, lo)


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_segments_that_have_not_met_are_run_in_order(passes: int) -> None:
    case = Case(2, 1, 100, 9, True, F32, 0)
    given = trained(case)
    shot = shooting.forward(linear, first_state(case, given), Affine(*given[3:5]), 1, 32, passes=passes)
    assert (shot.turns == 0).all()
    for found, expected in zip((shot.hi, shot.lo), last_state(case, given, 0), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("layer", [0, 40, 97])
@pytest.mark.parametrize("unit", [0, 2, 3])
def test_what_is_not_a_number_is_never_missed(unit: int, layer: int, value: float) -> None:
    """In the last segment it needs no turn more; anywhere else no start is ever right."""
    case = Case(2, 1, 100, 9, True, F32, 0)
    given = trained(case)
    given[4][layer, unit] = value
    shot = shooting.forward(linear, first_state(case, given), Affine(*given[3:5]), 1, 32)
    expected = torch.stack(last_state(case, given, 0)).sum(0)
    assert not expected.isfinite().all()
    torch.testing.assert_close(shot.hi + shot.lo, expected, equal_nan=True, rtol=1e-5, atol=1e-2)
    assert ((shot.turns == 0) == (layer < 96)).all()


def test_a_transposed_jacobian_is_that_of_the_layers() -> None:
    weight, bias, x = (draw(*shape, dtype=F64, seed=i) for i, shape in enumerate([(5, 3, 3), (5, 3), (3, 7)]))

    def layers(h: Tensor) -> Tensor:
        for w, b in zip(weight, bias, strict=True):
            h = torch.relu(w @ h + b)
        return h

    states = [torch.relu(x)]
    for w, b in zip(weight[:-1], bias[:-1], strict=True):
        states.append(torch.relu(w @ states[-1] + b[:, None]))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda z: layers(torch.relu(z))), in_dims=1, out_dims=2)(x)
    # The last ReLU is outside: G is what has passed it.
    last = torch.relu(weight[-1] @ states[-1] + bias[-1][:, None])
    found = shooting.transposed_jacobian(weight, torch.stack(states)) * (last > 0)
    torch.testing.assert_close(found, jacobian.transpose(0, 1))


def test_a_unit_that_a_relu_holds_follows_its_start() -> None:
    """Inputs below 0: units of base 0, which the ReLU lifts again and again. Without that it takes many more turns."""
    case = Case(2, 1, 262, 32, True, F32, 0)
    x, *params = trained(case)
    given = first_state(case, (-x.abs(), *params)), Affine(*params[2:4]), 1, 32
    turns = shooting.forward(linear, *given, passes=9).turns
    run = shooting._run
    with mock.patch.object(shooting, "_run", lambda *args: (*run(*args)[:2], x.new_zeros(4, 32))):
        others = shooting.forward(linear, *given, passes=9).turns
    assert turns.min() >= 2
    assert ((others == 0) | (others > turns.max())).all()
