"""The per-layer path on the CPU: the same results as the reference, whatever the segment."""

from __future__ import annotations

import pytest
import torch

from narrowdeep.ops.cnn import layered as cnn
from narrowdeep.ops.mlp import layered as mlp
from tests.gpu.cases import Case, Ops, check, check_spans, check_state, draw, draw_inputs

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
