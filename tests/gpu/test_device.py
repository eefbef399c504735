"""On a CUDA device: the ops against the reference, and the public modules as on the CPU. Skipped without a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import narrowdeep
from narrowdeep.ops.cnn.op import ops as cnn_ops
from narrowdeep.ops.gram.op import cnn_gram, mlp_gram
from narrowdeep.ops.gram.reference import DIAGONAL, FULL, TRACE
from narrowdeep.ops.mlp.op import ops as mlp_ops
from tests.gpu.cases import (
    MLP_TRUTH,
    NAMES,
    Case,
    GramCase,
    Ops,
    SecondCase,
    assert_close,
    check,
    check_gram,
    check_second,
    doubled,
    trained,
)

F32, F64 = torch.float32, torch.float64
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # in torch.func.jvp


def through(op: Callable[..., Any], device: str) -> Callable[..., Any]:
    """``op`` on a device, from and to CPU tensors."""

    def call(*args: Any) -> Any:
        result = op(*(a.to(device) if isinstance(a, Tensor) else a for a in args))
        return result.cpu() if isinstance(result, Tensor) else tuple(t.cpu() for t in result)

    return call


def ops_of(family: Any, device: str) -> Ops:
    return through(family.forward, device), through(family.backward, device), through(family.jvp, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("segment", [0, 1, 5, 64])
@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("inputs", "outputs", "depth", "batch"), [(1, 1, 129, 37), (2, 3, 40, 1), (11, 4, 35, 64)])
def test_mlp(
    inputs: int, outputs: int, depth: int, batch: int, dtype: torch.dtype, offset: bool, segment: int, device: str
) -> None:
    check(Case(inputs, outputs, depth, batch, offset, dtype, segment), ops_of(mlp_ops, device))


@pytest.mark.gpu
@pytest.mark.parametrize("width", range(2, 17))
def test_every_narrow_width(width: int) -> None:
    check(Case(1, 1, 36, 33, False, F32, 5, width=width), ops_of(mlp_ops, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("outputs", [16, 31, 62, 78, 200])  # tiles, then one layer at a time
def test_wide(outputs: int, dtype: torch.dtype) -> None:
    check(Case(1, outputs, 36, 33, True, dtype, 5), ops_of(mlp_ops, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [F32, F64])
def test_large_batch(dtype: torch.dtype) -> None:
    check(Case(2, 1, 40, 70_001, True, dtype, 7), ops_of(mlp_ops, "cuda"))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1000.0, 1.0], ids=["meets", "in order"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("inputs", "outputs"), [(2, 1), (4, 3)])
def test_few_samples_of_a_deep_chain(inputs: int, outputs: int, dtype: torch.dtype, scale: float, device: str) -> None:
    """What is taken with depth in parallel on CUDA, but forward where C_L is 1."""
    case = Case(inputs, outputs, 2500, 37, True, dtype, 50)
    given, settings = trained(case, scale), (scale, True, outputs, 0)
    forward, backward, _ = ops_of(mlp_ops, device)
    out, saved = forward(*given, *settings, 50)
    expected, _ = MLP_TRUTH.forward(*doubled(given), *settings, 0)
    assert_close(out, expected.to(dtype), "out")
    grad = torch.ones_like(out)
    grads = backward(grad, *given, saved, *settings, 50, True, True)
    needed = *settings, 50, True, True
    wanted = MLP_TRUTH.backward(*doubled((grad, *given, saved)), *needed)
    for name, a, b in zip(NAMES, grads, wanted, strict=True):
        assert_close(a, b.to(dtype), f"gradient of {name}")
    assert all(torch.equal(a, b) for a, b in zip(grads, backward(grad, *given, saved, *needed), strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("segment", [0, 1, 5])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("outputs", "image", "tap"), [(1, (7, 7), 3), (2, (3, 5), 1), (1, (4, 6), 5)])
def test_conv(outputs: int, image: tuple[int, int], tap: int, dtype: torch.dtype, segment: int, device: str) -> None:
    check(Case(1, outputs, 36, 5, True, dtype, segment, image=image, tap=tap), ops_of(cnn_ops, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("ends", [(True, True), (False, False)], ids=["network", "span"])
@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("inputs", "outputs", "image"), [(1, 1, ()), (10, 5, ()), (30, 9, ()), (1, 1, (7, 5))])
def test_second_derivatives(
    inputs: int, outputs: int, image: Any, dtype: torch.dtype, offset: bool, ends: tuple[bool, bool], device: str
) -> None:
    op = cnn_ops.backward_jvp if image else mlp_ops.backward_jvp
    case = Case(inputs, outputs, 69, 37, offset, dtype, 0, image=image)
    start = 0 if ends[0] else 29
    check_second(SecondCase(case, *ends, start), through(op, device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduce", [FULL, TRACE, DIAGONAL], ids=["full", "trace", "diagonal"])
@pytest.mark.parametrize("others", [0, 33])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("image", [(), (7, 5)])
def test_tangent_kernel(image: tuple[int, ...], dtype: torch.dtype, others: int, reduce: int, device: str) -> None:
    case = Case(1, 2, 37, 17, True, dtype, 0, image=image)
    check_gram(GramCase(case, others, reduce), through(cnn_gram if image else mlp_gram, device))


@pytest.mark.parametrize("device", DEVICES)
def test_training_step_and_transforms(device: str) -> None:
    """One wrapper for both devices: backward, jacrev, jacfwd and vmap agree with the eager network."""
    model = narrowdeep.DeepNarrowMLP(2, 1, 40, dtype=F64).to(device)
    eager = model.to_sequential()
    x = torch.rand(9, 2, dtype=F64, generator=torch.Generator().manual_seed(3)).to(device).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x)
    (expected,) = torch.autograd.grad(eager(x).sum(), x)
    torch.testing.assert_close(grad, expected)
    torch.testing.assert_close(torch.func.vmap(torch.func.jacrev(model))(x), expected[:, None])
    torch.testing.assert_close(torch.func.vmap(torch.func.jacfwd(model))(x), expected[:, None])
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
def test_results_repeat_bit_for_bit() -> None:
    model = narrowdeep.DeepNarrowMLP(3, 2, 300).cuda()
    x = torch.rand(20_000, 3, device="cuda")
    runs = [torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for _ in range(3)]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.gpu
def test_autotuned_blocks_give_the_same_result() -> None:
    from narrowdeep.ops import triton_common

    model = narrowdeep.DeepNarrowMLP(3, 2, 100).cuda()
    x = torch.rand(5000, 3, device="cuda")
    expected = model(x)
    triton_common.autotune()
    try:
        assert torch.equal(model(x), expected)
    finally:
        triton_common.autotune(False)


@pytest.mark.gpu
def test_cuda_graph() -> None:
    model = narrowdeep.DeepNarrowMLP(1, 1, 200).cuda()
    x = torch.rand(64, 1, device="cuda")
    with torch.no_grad():
        expected = model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(x)
        graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    model = narrowdeep.DeepNarrowMLP(1, 1, 5).cuda().to(dtype)
    with pytest.raises(TypeError, match=r"must be torch\.float32 or torch\.float64"):
        model(torch.rand(4, 1, device="cuda", dtype=dtype))
