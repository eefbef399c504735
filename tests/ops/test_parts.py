"""Chains taken in parts, ``advance`` and ``retreat`` composed, against the chain in one op."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from narrowdeep.ops import engine
from narrowdeep.ops.chain import ChainOps
from narrowdeep.ops.cnn import layered as conv_layered
from narrowdeep.ops.mlp import layered as mlp_layered
from narrowdeep.ops.reference import advance_saved_shape
from tests.ops.chains import TOLERANCE, Case, assert_close, truth

SCALE = 7.0
BORDERS = [(127,), (1, 30, 2, 50, 44), (33, 94), (64, 63)]  # layers of each part; moves come every 32 layers
CASES = [Case(1, 1, 129, 57), Case(4, 3, 129, 37), Case(12, 10, 129, 5), Case(1, 2, 129, 3, 3, (3, 4))]
PLAIN_CASES = [Case(3, 2, 129, 20, hidden=1), Case(2, 9, 129, 37, hidden=9), Case(3, 3, 129, 5, 3, (2, 3), hidden=2)]
FORMS = [(case, True) for case in CASES] + [(case, False) for case in CASES + PLAIN_CASES]

forms = pytest.mark.parametrize(("case", "offset"), FORMS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
every_build = pytest.mark.parametrize("isa", engine.instruction_sets())


class Ends(NamedTuple):
    """What surrounds the hidden layers of a case, from the chain in one op: the reference's, rounded to ``dtype``."""

    x: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor
    grad_out: Tensor
    first: Tensor
    """State 1."""
    last: Tensor
    """State L-1."""
    gradient: Tensor
    """At state L-1."""


def _ends(case: Case, dtype: torch.dtype, offset: bool) -> Ends:
    wanted = truth(case, dtype, offset, SCALE)
    x, w1, b1, hidden_weight, hidden_bias, wl, bl = wanted.args
    reference = case.family.reference
    no_layers = (hidden_weight[:0], hidden_bias[:0])
    first = reference.forward(x, w1, b1, *no_layers, wl, bl, SCALE, offset, 2)[1][0]
    last = wanted.states[-1].to(dtype)
    layer = (mlp_layered.LINEAR if case.family.name == "mlp" else conv_layered.CONVOLUTION).transpose
    r = wanted.grad_out.t().reshape(case.outputs, *(1 for _ in case.image), case.batch)
    r = (r / max(1, case.image[0] * case.image[1] if case.image else 1)).expand(case.outputs, *case.image, case.batch)
    g = layer(wl, r.contiguous(), torch.empty_like(last[0]))
    if offset:
        root = torch.zeros_like(g)
        root[case.width - case.outputs :] = r
        gradient = torch.stack((torch.zeros_like(g), torch.where(last[0] <= 0, -root, g)))
    else:
        gradient = torch.where(last <= 0, torch.zeros_like(last), g)
    return Ends(x, hidden_weight, hidden_bias, wanted.grad_out, first, last, gradient)


class Result(NamedTuple):
    state: Tensor
    gradient: Tensor
    hidden_weight: Tensor
    hidden_bias: Tensor


def _in_parts(ops: ChainOps, case: Case, ends: Ends, offset: bool, parts: tuple[int, ...], segment: int) -> Result:
    """Forward and backward through the hidden layers, in parts of so many layers."""
    settings: tuple[Any, ...] = (case.outputs, SCALE, offset)
    ranges = list(pairwise((0, *accumulate(parts))))
    state, kept = ends.first, []
    for begin, end in ranges:
        weights = (ends.hidden_weight[begin:end], ends.hidden_bias[begin:end])
        after, saved = ops.advance(state, ends.x, *weights, *settings, begin + 1, segment)
        assert saved.shape == advance_saved_shape(end - begin, tuple(state.shape[1:]), offset, segment)
        kept.append((state, weights, saved))
        state = after
    gradient, grads = ends.gradient, []
    for (begin, _), (before, weights, saved) in zip(reversed(ranges), reversed(kept), strict=True):
        arguments = (gradient, ends.grad_out, before, ends.x, *weights, saved, *settings, begin + 1, segment)
        gradient, *some = ops.retreat(*arguments, True)
        same, *none = ops.retreat(*arguments, False)
        assert torch.equal(same, gradient)
        assert all(t.shape == (0,) for t in none)
        grads.append(some)
    return Result(state, gradient, *(torch.cat(g[::-1]) for g in zip(*grads, strict=True)))


def _layered(case: Case) -> ChainOps:
    module: Any = mlp_layered if case.family.name == "mlp" else conv_layered
    names = ("forward", "backward", "jvp", "advance", "retreat")
    return ChainOps(*(getattr(module, f"{case.family.name}_{name}") for name in names))


def _check(ops: ChainOps, case: Case, dtype: torch.dtype, offset: bool, exact: bool = True) -> None:
    """Within rounding of the reference's chain in one op, and the same whatever the parts and the segment: to the bit,
    or where a BLAS sums in an order that depends on where its operands lie, to rounding."""
    ends, wanted = _ends(case, dtype, offset), truth(case, dtype, offset, SCALE)
    results = {
        (parts, segment): _in_parts(ops, case, ends, offset, parts, segment)
        for parts in BORDERS
        for segment in (0, 1, 2, 20, 1000)
    }
    (_, one), *others = results.items()
    assert all(t.dtype == dtype and t.isfinite().all() for t in one)
    assert_close(one.hidden_weight, wanted.grads[3], TOLERANCE[dtype], "hidden_weight")
    assert_close(one.hidden_bias, wanted.grads[4], TOLERANCE[dtype], "hidden_bias")
    if not offset:
        assert_close(one.state, ends.last, TOLERANCE[dtype], "state")
        assert_close(one.gradient.flatten(2).sum((0, 2)), wanted.grads[2], TOLERANCE[dtype], "gradient")
    for key, result in others:
        for name, a, b in zip(Result._fields, one, result, strict=True):
            changed = f"{name} changes with (parts, segment) {key}"
            if exact:
                assert torch.equal(a, b), changed
            else:
                assert_close(a, b, TOLERANCE[dtype], changed)


@forms
def test_reference(case: Case, offset: bool) -> None:
    _check(case.family.reference, case, torch.float64, offset)


@dtypes
@forms
def test_one_layer_at_a_time(dtype: torch.dtype, case: Case, offset: bool) -> None:
    _check(_layered(case), case, dtype, offset, exact=False)


@dtypes
@forms
@every_build
def test_engine(isa: str, dtype: torch.dtype, case: Case, offset: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    _check(case.family.ops, case, dtype, offset, exact=case.family.name == "conv")  # the MLP's run layer by layer yet


@forms
@every_build
def test_states_are_those_that_the_chain_in_one_op_saves(
    isa: str, case: Case, offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NARROWDEEP_ISA", isa)
    args = truth(case, torch.float64, offset, SCALE).args
    _, saved = case.family.ops.forward(*args, SCALE, offset, 40)
    for i in range(1, saved.shape[0]):
        layers = slice(40 * i - 40, 40 * i)
        state, _ = case.family.ops.advance(
            saved[i - 1], args[0], args[3][layers], args[4][layers], case.outputs, SCALE, offset, 40 * i - 39, 0
        )
        for got, want in zip(state, saved[i], strict=True):
            assert_close(got, want, 1e-12)


@pytest.mark.parametrize("case", [Case(2, 2, 40, 20), Case(1, 2, 40, 20, 3, (3, 4))], ids=["mlp", "conv"])
@pytest.mark.parametrize("segment", [0, 1, 8])
def test_opcheck(case: Case, segment: int) -> None:
    ends = _ends(case, torch.float64, True)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    weights = (ends.hidden_weight, ends.hidden_bias)
    settings = (case.outputs, SCALE, True, 1, segment)
    torch.library.opcheck(case.family.ops.advance, (ends.first, ends.x, *weights, *settings), test_utils=tests)
    _, saved = case.family.ops.advance(ends.first, ends.x, *weights, *settings)
    for need in (True, False):
        args = (ends.gradient, ends.grad_out, ends.first, ends.x, *weights, saved, *settings, need)
        torch.library.opcheck(case.family.ops.retreat, args, test_utils=tests)


@pytest.mark.parametrize("case", [Case(2, 2, 40, 0), Case(1, 2, 40, 0, 3, (3, 4))], ids=["mlp", "conv"])
def test_no_samples(case: Case) -> None:
    result = _in_parts(case.family.ops, case, _ends(case, torch.float32, True), True, (10, 28), 4)
    assert result.state.shape == (2, case.width, *case.image, 0)
    assert not result.hidden_weight.any()
    assert not result.hidden_bias.any()
