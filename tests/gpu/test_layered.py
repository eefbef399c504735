"""The per-layer path on the CPU: the same results as the reference, whatever the segment."""

from __future__ import annotations

import pytest
import torch

from narrowdeep.ops.cnn import layered as cnn
from narrowdeep.ops.mlp import layered as mlp
from tests.gpu.cases import Case, Ops, check, check_spans, check_state, draw, draw_inputs
from tests.ops.chains import NAMES, TOLERANCE, assert_close, truth
from tests.ops.chains import Case as Spec

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # in torch.func.jvp

MLP: Ops = (mlp.mlp_forward, mlp.mlp_backward, mlp.mlp_jvp)
CNN: Ops = (cnn.cnn_forward, cnn.cnn_backward, cnn.cnn_jvp)


@pytest.mark.parametrize("segment", [0, 1, 2, 5, 64, 500])
@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("depth", "batch"), [(2, 1), (3, 0), (40, 7), (129, 37)])
def test_mlp(depth: int, batch: int, dtype: torch.dtype, offset: bool, segment: int) -> None:
    check(Case(3, 13, depth, batch, offset, dtype, segment), MLP)


@pytest.mark.parametrize("segment", [0, 1, 5, 64])
@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize(("depth", "image", "tap"), [(2, (1, 1), 1), (36, (3, 5), 3), (4, (2, 3), 5)])
def test_conv(depth: int, image: tuple[int, int], tap: int, offset: bool, segment: int) -> None:
    check(Case(2, 1, depth, 3, offset, torch.float64, segment, image=image, tap=tap), CNN)


@pytest.mark.parametrize("segment", [0, 1, 5, 64])
@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("cuts", [(17,), (1, 33), (32, 64)])
@pytest.mark.parametrize(("ops", "image"), [(MLP, ()), (CNN, (2, 3))], ids=["mlp", "cnn"])
def test_spans(ops: Ops, image: tuple[int, ...], cuts: tuple[int, ...], offset: bool, segment: int) -> None:
    check_spans(Case(2, 1, 68, 3, offset, torch.float32, segment, image=image), ops, cuts)


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("start", [0, 31, 2**40 + 5])
@pytest.mark.parametrize(("ops", "image"), [(MLP, ()), (CNN, (2, 3))], ids=["mlp", "cnn"])
def test_a_state_from_anywhere(ops: Ops, image: tuple[int, ...], start: int, offset: bool) -> None:
    check_state(Case(2, 1, 6, 5, offset, torch.float64, 2, image=image), ops, start)


def test_results_do_not_depend_on_the_segment() -> None:
    case = Case(2, 2, 70, 5, True, torch.float32, 0)
    inputs = draw_inputs(case)
    grad = draw(5, 2, dtype=torch.float32, seed=9)
    forward, backward, _ = MLP
    results = []
    for segment in (0, 1, 3, 32):
        settings = (10.0, True, 2, 0, segment)
        out, saved = forward(*inputs, *settings)
        results.append((out, *backward(grad, *inputs, saved, *settings, True, True)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def test_nan_stays_nan() -> None:
    case = Case(2, 1, 5, 3, False, torch.float32, 1)
    x, *params = draw_inputs(case)
    x[1, 0] = torch.nan
    forward, _, _ = MLP
    out, _ = forward(x, *params, 10.0, False, 1, 0, 1)
    assert out.isnan().flatten().tolist() == [False, True, False]


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "case", [Spec(3, 9, 40, 7), Spec(2, 1, 2, 1), Spec(2, 1, 3, 0), Spec(2, 1, 35, 3, 3, (3, 5))], ids=str
)
def test_second_derivatives(case: Spec, dtype: torch.dtype, offset: bool) -> None:
    wanted = truth(case, dtype, offset, 7.0)
    op = cnn.cnn_backward_jvp if case.filter else mlp.mlp_backward_jvp
    for grad_out_t, tangents, wants in zip((wanted.grad_out_t, None), wanted.tangents, wanted.second, strict=True):
        args = (wanted.grad_out, grad_out_t, *wanted.args, *tangents, 7.0, offset, case.outputs, 0)
        found = op(*args, True, True)
        for name, result, want in zip(NAMES, found, wants, strict=True):
            assert_close(result, want, TOLERANCE[dtype], name)
        assert torch.equal(op(*args, True, False)[0], found[0])
        assert [t.numel() for t in op(*args, False, False)] == [0] * 7


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("case", [Spec(2, 1, 70, 5), Spec(1, 2, 40, 3, 3, (2, 3))], ids=str)
def test_second_derivatives_of_spans(case: Spec, offset: bool) -> None:
    """Hidden layers alone, with a state that comes in and one that goes out, are those of the engine."""
    op = cnn.cnn_backward_jvp if case.filter else mlp.mlp_backward_jvp
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    n, state = case.width, (3 if offset else 1, case.width, *case.image, case.batch)
    hidden = [None, None, 0.02 * draw(case.depth, n, n, *case.tap), 0.1 * draw(case.depth, n), None, None]
    hidden_t = [None if t is None else draw(*t.shape) for t in hidden]
    words, middle = [draw(*state) for _ in range(4)], n - case.outputs - 1
    if offset:  # as states, their tangents and their gradients are
        for value in words:
            value[:2, middle] = 0
            value[0, middle + 1 :] = 7.0 if value is words[2] else 0
        words[3][0, middle:] = 0
        for gradient in words[:2]:
            gradient[0] = 0
            gradient[0, middle + 1 :] = draw(case.outputs, *(1 for _ in case.image), case.batch)
    args = (*words[:3], *hidden, words[3], *hidden_t, 7.0, offset, case.outputs, 5)
    found, wants = op(*args, True, True), case.family.ops.raw.backward_jvp(*args, True, True)
    assert_close(found[0].sum(0), wants[0].sum(0), 1e-11, "state")
    for result, want in zip(found[1:], wants[1:], strict=True):
        assert_close(result, want, 1e-11)
