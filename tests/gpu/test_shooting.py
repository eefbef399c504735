"""Depth in parallel on a GPU: its kernels as executed PTX, and when it is used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton")

from narrowdeep.ops import shooting, triton_backward, triton_chain, triton_common, triton_dispatch, triton_shooting
from narrowdeep.ops.cnn import triton as cnn
from narrowdeep.ops.mlp import triton as mlp
from narrowdeep.ops.mlp.reference import linear
from narrowdeep.ops.params import Affine, ChainParams, ChainSettings
from tests.gpu.cases import MLP_TRUTH, NAMES, Case, doubled, draw, draw_inputs, first_state, trained
from tests.gpu.interpreted import MLP
from tests.gpu.simulator import Simulator, load
from tests.gpu.test_dispatch import _WAITING, counted

F32, F64 = torch.float32, torch.float64
SCALE = 1000.0


class Shots(Simulator):
    """Keeps ``failed`` as ``chain_sequential`` finds it."""

    failed: Tensor

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        super().launch(kernel, grid, *args, **constants)
        if kernel.fn.__name__ == "chain_sequential":
            self.failed = args[0]


@contextmanager
def forced(simulator: Simulator, forward: int, backward: int, **limits: Any) -> Iterator[None]:
    """Segments of so many layers whatever the shape; 0: the chain in order."""
    load()
    stand_ins: dict[str, Any] = {"launch": simulator.launch, "empty": simulator.empty}
    lengths = {"forward": forward, "backward": backward}
    with (
        mock.patch.multiple(triton_chain, **stand_ins | limits),
        mock.patch.multiple(triton_shooting, segment_length=lambda kernel, *args: lengths[kernel], **stand_ins),
        mock.patch.multiple(mlp, **stand_ins),
        mock.patch.object(triton_common, "capability", return_value=simulator.target),
    ):
        yield


def results(case: Case, inputs: Any, ops: Any, cast: Any = tuple) -> dict[str, Tensor]:
    """Output, checkpoints and all gradients of a network."""
    forward, backward = ops
    settings = (SCALE, case.offset, case.out_features, 0)
    out, saved = forward(*cast(inputs), *settings, case.segment)
    grad = draw(case.batch, case.out_features, dtype=case.dtype, seed=8)
    (grad,) = cast((grad,))
    grads = backward(grad, *cast(inputs), saved, *settings, case.segment, True, True)
    return {"out": out, "saved": saved, **dict(zip(NAMES, grads, strict=True))}


def compare(case: Case, inputs: Any, found: dict[str, Tensor], other: dict[str, Tensor] | None = None) -> None:
    """Against float64, nothing is more than twice as far off as the other results, those of the reference if None."""
    ops = MLP_TRUTH.forward, MLP_TRUTH.backward
    truth, other = results(case, inputs, ops, doubled), other or results(case, inputs, ops)
    for name, expected in truth.items():
        assert found[name].shape == expected.shape, name
        if not expected.numel():
            continue
        size = expected.abs().max()
        error, chain = ((value[name].double() - expected).abs().max() / size for value in (found, other))
        assert error <= 2 * chain + shooting.BOUND[case.dtype], f"{name}: {error:.1e}, of the chain {chain:.1e}"


CASES = [
    (Case(2, 1, 102, 37, True, F32, 7), 32, 32),  # four segments, two blocks of samples, the last ragged
    (Case(1, 1, 133, 5, True, F32, 1), 64, 32),
    (Case(4, 3, 102, 19, True, F32, 0), 32, 64),  # tensor cores
    (Case(2, 1, 70, 36, True, F64, 33), 32, 32),
    (Case(4, 3, 68, 3, True, F64, 5), 32, 32),
    (Case(2, 1, 70, 5, False, F32, 5, width=5), 32, 32),  # plain form: the backward alone
    (Case(2, 1, 70, 33, False, F64, 1), 32, 64),
]


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(("case", "forward", "backward"), CASES, ids=str)
def test_kernels(case: Case, forward: int, backward: int, target: int) -> None:
    simulator, inputs, passes = Shots(target), trained(case), 1
    if case.offset:  # as many turns as the algorithm needs
        hidden = Affine(*inputs[3:5])
        turns = shooting.forward(linear, first_state(case, inputs), hidden, case.out_features, forward).turns
        passes = int(turns.max())
    with forced(simulator, forward, backward), mock.patch.dict(triton_shooting.PASSES, {case.dtype: passes}):
        found = results(case, inputs, MLP[:2])
    assert simulator.launches.count("chain_sequential") == (0 if not case.offset else 2 if case.segment == 0 else 1)
    assert simulator.launches.count("backward_segments") == 2
    assert {"chain_forward", "chain_backward"} & set(simulator.launches) == (
        set() if case.offset else {"chain_forward"}
    )
    compare(case, inputs, found)
    if case.offset:
        assert simulator.failed.eq(0).all()


def test_a_thousand_layers() -> None:
    """Eleven segments forward, sixteen back: no more is lost than by the kernels that go layer after layer."""
    case = Case(2, 1, 1002, 32, True, F32, 37)
    inputs, simulator = trained(case), Shots(90)
    with forced(simulator, 96, 64):
        found = results(case, inputs, MLP[:2])
    assert simulator.failed.eq(0).all()
    with forced(simulator, 0, 0):
        compare(case, inputs, found, results(case, inputs, MLP[:2]))


@pytest.mark.parametrize("count", [2, 9, 31, 128])
@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize(("width", "outputs"), [(3, 1), (5, 2), (8, 3)])
def test_boundaries_are_joined_as_by_the_algorithm(width: int, outputs: int, dtype: torch.dtype, count: int) -> None:
    """Every size of a program's tile; ends that no chain need have made, above their floor."""
    batch, middle = 5, width - outputs - 1

    def numbers(*shape: int, seed: int) -> Tensor:
        return draw(*shape, width, batch, dtype=dtype, seed=seed)

    base, hi, lo = numbers(seed=1).abs() * 3, numbers(seed=2) * 0.1, numbers(seed=3) * 0.01
    ends, pushed = torch.stack((numbers(count, seed=4), numbers(count, seed=5) * 0.01), 1), numbers(count, seed=6)
    base[middle] = hi[middle] = ends[:, 0, middle] = 0
    ends[:, 0] = torch.maximum(ends[:, 0], -base)
    ends[:, 1] = torch.maximum(ends[:, 1], -(base + ends[:, 0]))
    pushed = pushed.clamp(min=0)
    every = [(*end, lifted) for end, lifted in zip(ends, pushed, strict=True)]
    expected, met = shooting._join(base, [(hi, lo)] * count, every, outputs)
    x, weight = torch.empty(batch, 1, dtype=dtype), torch.empty(1, width, width, dtype=dtype)
    block = mlp.blocks("forward", x, weight, True)[-1]
    how = triton_shooting.joining("forward", block, width, dtype, count) | {"MIDDLE": middle, "WIDTH": width}
    starts, failed = ends.new_empty(count - 1, 2, width, batch), ends.new_empty(-(-batch // how["BLOCK"]))
    tensors = base, hi, lo, ends, pushed, starts, failed
    Simulator(90).launch(triton_shooting.join_states, (len(failed),), *tensors, batch, count, 0, **how)
    wanted = torch.stack([torch.stack(start) for start in expected[1:]])
    torch.testing.assert_close(starts.sum(1), wanted.sum(1), rtol=0, atol=count * torch.finfo(dtype).eps)
    assert failed.tolist() == [float(not part.all()) for part in met.split(how["BLOCK"])]


@pytest.mark.parametrize(("case", "forward", "backward"), [CASES[0], CASES[2], CASES[3]], ids=str)
def test_a_forward_whose_segments_do_not_meet_is_that_of_the_chain(case: Case, forward: int, backward: int) -> None:
    """To the bit, whatever the turns have left behind; also where blocks of samples differ."""
    inputs, simulator = trained(case), Shots(90)
    with forced(simulator, 0, 0):
        expected = results(case, inputs, MLP[:2])
    with (
        forced(simulator, forward, 0),
        mock.patch.dict(triton_shooting.BOUND, dict.fromkeys((F32, F64), -1.0)),
        mock.patch.dict(triton_shooting.PASSES, dict.fromkeys((F32, F64), 2)),
    ):
        found = results(case, inputs, MLP[:2])
    assert simulator.failed.eq(1).all()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_blocks_of_samples_are_left_as_soon_as_they_have_met() -> None:
    """One sample is not a number: its block goes in order, the other one does not."""
    case = Case(2, 1, 102, 37, True, F32, 9)
    inputs, simulator = trained(case), Shots(90)
    inputs[0][35] = math.nan
    with forced(simulator, 0, 0):
        expected = results(case, inputs, MLP[:2])
    with forced(simulator, 32, 32):
        found = results(case, inputs, MLP[:2])
    blocks = simulator.failed.unflatten(0, (2, -1)).amax(1)
    assert blocks.tolist() == [0, 1]
    assert found["out"][35].isnan().all()
    assert torch.equal(found["out"].isnan(), expected["out"].isnan())
    assert torch.equal(found["out"][32:35], expected["out"][32:35])
    assert torch.equal(found["saved"][..., 32:35], expected["saved"][..., 32:35])
    torch.testing.assert_close(found["out"][:32], expected["out"][:32], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("start", [31, 2**40 + 5])
def test_spans_that_begin_anywhere(start: int, offset: bool) -> None:
    """From a state to a state, its number not where segments begin; in two groups of the backward."""
    case = Case(2, 1, 102, 5, offset, F64, 3)
    simulator, inputs = Shots(80), trained(case)
    settings = (SCALE, offset, 1, start)
    hidden = (None, None, *inputs[3:5], None, None)
    if offset:
        state = torch.stack(first_state(case, inputs))
        grad = draw(3, 4, 5, dtype=F64, seed=3)
        grad[:2, 2] = 0
        grad[0, :2] = 0
    else:
        state, grad = draw(1, 4, 5, dtype=F64, seed=2).abs(), draw(1, 4, 5, dtype=F64, seed=3)
    group = 2 * 51 * 4 * 5 * 8
    with forced(simulator, 32, 32, scratch_bytes=lambda device: group):
        out, saved = MLP[0](state, *hidden, *settings, 3)
        found = MLP[1](grad, state, *hidden, saved, *settings, 3, True, True)
    assert simulator.launches.count("backward_segments") == 2 * 2
    expected, _ = MLP_TRUTH.forward(state, *hidden, *settings, 0)
    torch.testing.assert_close(out.sum(0), expected.sum(0), rtol=0, atol=1e-12 * expected.abs().max().item())
    with forced(simulator, 0, 0):
        saved = MLP[0](state, *hidden, *settings, 3)[1]
        others = MLP[1](grad, state, *hidden, saved, *settings, 3, True, True)
    for a, b in zip((found[0].sum(0), *found[3:5]), (others[0].sum(0), *others[3:5]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * b.abs().max().item())


@pytest.mark.parametrize(("number", "seed"), [(0, 0), (0, 1), (0, 2), (2, 0), (6, 0), (6, 1)], ids=str)
def test_random_warp_order(number: int, seed: int) -> None:
    case, forward, backward = CASES[number]
    case = replace(case, batch=3, depth=68)
    inputs, simulator = trained(case), Shots(80, mode="warp", seed=seed)
    with forced(simulator, forward, backward), mock.patch.dict(triton_shooting.PASSES, {F32: 3}):
        found = results(case, inputs, MLP[:2])
    compare(case, inputs, found)


def length(
    kernel: str, batch: int, width: int, layers: int, dtype: torch.dtype = F32, offset: bool = True, image: Any = ()
) -> int:
    family, taps = (cnn.FAMILY, (3, 3)) if image else (mlp.FAMILY, ())
    x = torch.empty(batch, 1, *image, dtype=dtype, device="meta")
    weight = torch.empty(layers, width, width, *taps, dtype=dtype, device="meta")
    return triton_shooting.segment_length(kernel, family, x, weight, offset, layers)


def test_small_batches_of_deep_narrow_chains_are_taken_in_parallel() -> None:
    assert length("forward", 128, 4, 9998) == 96  # 105 segments of 4 blocks
    assert length("forward", 2112, 4, 9998) == 640  # 66 blocks: 16 segments each
    assert length("forward", 2113, 4, 9998) == 0
    assert length("forward", 1, 3, 10**6) == 7904  # at most 127 and a begun one
    assert length("forward", 1056, 8, 9998) == 640  # blocks of 16 samples
    assert length("forward", 1057, 8, 9998) == 0
    assert length("forward", 2112, 8, 9998, F64) == 640
    assert length("forward", 128, 9, 9998) == length("forward", 128, 20, 9998) == 0
    assert length("forward", 128, 4, 2047) == 0
    assert length("forward", 128, 3, 9998, image=(2, 2)) == 0
    assert length("backward", 128, 4, 8000) == 128  # 66 segments of 4 blocks and 4 unit vectors
    assert length("backward", 2112, 4, 8000) == 2016
    assert length("backward", 2113, 4, 8000) == 0
    assert length("backward", 128, 8, 8000) == 512
    assert length("backward", 128, 4, 383) == 0
    assert length("backward", 128, 4, 384, offset=False) == 32


def test_info_says_when() -> None:
    kernels = triton_dispatch.triton_status()["kernels"]
    assert "scale >= 64, 2048 hidden layers or more, up to 16 samples" in kernels["mlp forward, depth in parallel"]
    assert "384 layers or more at a time, up to 64 / width samples" in kernels["mlp backward, depth in parallel"]


@pytest.mark.parametrize(("scale", "parallel"), [(64.0, True), (63.9, False)])
def test_kernels_and_memory_of_a_call(scale: float, parallel: bool) -> None:
    """As many launches whatever the numbers, which the host never reads; the same allocations in every call."""
    case = Case(2, 1, 2050, 3, True, F32, 46)
    inputs: Any = draw_inputs(case)
    settings, calls = (scale, True, 1, 0), []
    for _ in range(2):
        with counted() as work:
            out, saved = MLP[0](*inputs, *settings, 46)
            forward = [name for name in work.kernels if name.startswith(("chain", "join", "pack"))]
            MLP[1](out, *inputs, saved, *settings, 46, True, True)
        assert not _WAITING & set(work.kernels)
        calls.append((work.kernels, work.allocated))
    assert calls[0] == calls[1]
    turns = ["chain_segments", "join_states"] * shooting.PASSES[F32]
    assert forward == ["pack", *turns, "chain_sequential"] if parallel else ["pack", "chain_forward"]
    ours = [name for name in calls[0][0] if name.endswith(("recompute", "segments", "gradients", "gradient"))]
    backward = ["chain_recompute", "backward_segments", "join_gradients", "backward_segments", "weight_gradient"]
    assert ours[-5:] == backward


@pytest.mark.parametrize("start", [0, 17])
def test_workspace_counts_it(start: int) -> None:
    case = Case(2, 1, 502, 3, True, F32, 25)
    inputs: Any = draw_inputs(case)
    _, *params = inputs
    allocated = 0

    def empty(like: Tensor, *shape: int) -> Tensor:
        nonlocal allocated
        allocated += math.prod(shape)
        return like.new_empty(shape)

    span: Any = ChainParams.of((None, None, *params[2:4], None, None))
    state, saved = torch.rand(3, 4, 3), torch.rand(19, 2, 4, 3)
    settings = ChainSettings(SCALE, True, 1, start)
    with (
        mock.patch.multiple(triton_chain, empty=empty, launch=mock.Mock()),
        mock.patch.multiple(triton_shooting, empty=empty, launch=mock.Mock()),
    ):
        descent = triton_chain.Descent(mlp.FAMILY, state, span, saved, settings, 25, 500)
        list(descent.groups(torch.rand(3, 4, 3), True))
    workspace = triton_backward.workspace(mlp.FAMILY, torch.empty(3, 2), params[2], True, 25)
    assert workspace is not None
    segment = sum(
        math.prod(shape[1:])
        for shape in triton_shooting.backward_shapes(
            mlp.FAMILY.blocks("backward", state[0].t(), params[2], True)[-1], 4, 3, 3, (0, 500), 32
        )
    )
    assert 0 <= workspace // 4 - allocated <= segment
