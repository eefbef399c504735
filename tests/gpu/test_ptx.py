"""Every kernel as the PTX Triton emits, executed: results, bounds, uninitialised reads, races, unwritten outputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from narrowdeep.ops import triton_backward, triton_chain, triton_common, triton_second
from narrowdeep.ops.cnn import triton as cnn
from narrowdeep.ops.gram import triton as gram
from narrowdeep.ops.mlp import triton as mlp
from narrowdeep.ops.triton_common import Block
from tests.gpu.cases import (
    MLP_TRUTH,
    NAMES,
    SCALE,
    Case,
    GramCase,
    SecondCase,
    check,
    check_gram,
    check_second,
    check_second_spans,
    check_spans,
    check_state,
    doubled,
    draw,
    draw_inputs,
)
from tests.gpu.interpreted import CNN, MLP
from tests.gpu.simulator import Simulator, load

F32, F64 = torch.float32, torch.float64
CASES = [
    Case(1, 1, 37, 37, True, F32, 5),  # crosses a move of the base; two blocks, the last one ragged
    Case(1, 1, 37, 36, False, F64, 1),  # a batch that divides by 4: vector loads
    Case(2, 3, 36, 5, True, F64, 7),
    Case(2, 2, 4, 33, False, F32, 0),
    Case(1, 3, 37, 19, True, F32, 5),  # tensor cores: one tile of 8 units, not all taken; a ragged block
    Case(5, 2, 36, 16, True, F32, 1),
    Case(10, 5, 35, 5, True, F32, 0),  # 2 x 2 tiles
    Case(10, 7, 4, 17, True, F32, 2),  # tiles of 16 units: 2 x 2
    Case(10, 7, 4, 17, True, F64, 1),
    Case(2, 1, 4, 5, False, F32, 1, width=17),
    Case(2, 1, 4, 5, False, F64, 2, width=17),
    Case(5, 3, 4, 5, True, F64, 2),  # jvp alone in tiles
    Case(5, 3, 4, 5, False, F64, 1),
    Case(5, 3, 4, 5, True, F32, 1),
    Case(5, 3, 4, 5, False, F32, 2),
    Case(40, 39, 4, 5, False, F32, 2, width=80),
    Case(20, 10, 36, 5, True, F32, 7),
    Case(21, 10, 35, 5, True, F64, 6),
    Case(1, 1, 35, 3, True, F32, 4, image=(3, 5)),
    Case(2, 1, 4, 3, False, F64, 1, image=(7, 7)),
    Case(1, 1, 4, 2, True, F64, 2, image=(2, 3)),
    Case(2, 1, 3, 2, False, F32, 1, image=(3, 2)),
    Case(1, 1, 4, 2, True, F32, 2, image=(28, 28)),
    Case(1, 1, 3, 1, True, F64, 1, image=(4, 5), tap=5),
]
SLOW = [
    Case(8, 3, 36, 37, True, F32, 5),
    Case(11, 4, 36, 37, True, F64, 0),
    Case(10, 5, 4, 17, True, F64, 1),
    Case(11, 4, 4, 37, False, F32, 2),
    Case(40, 10, 4, 5, True, F32, 2),
    Case(1, 10, 4, 2, True, F32, 2, image=(7, 7)),
    Case(1, 10, 4, 1, True, F64, 2, image=(7, 7)),
    Case(1, 1, 4, 2, True, F64, 1, image=(4, 9), tap=5),
]


pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # in torch.func.jvp


@contextmanager
def simulated(simulator: Simulator, **limits: Any) -> Iterator[None]:
    load()
    stand_ins: dict[str, Any] = {"launch": simulator.launch, "empty": simulator.empty}
    with (
        mock.patch.multiple(triton_chain, **stand_ins | limits),
        mock.patch.multiple(triton_backward, **stand_ins),
        mock.patch.object(triton_second, "empty", simulator.empty),
        mock.patch.multiple(mlp, **stand_ins | {"_SPLIT": 512}),
        mock.patch.multiple(cnn, **stand_ins | {"_SPLIT": 128}),
    ):
        yield


def run(case: Case, simulator: Simulator, **limits: Any) -> None:
    with simulated(simulator, **limits):
        check(case, CNN if case.image else MLP)
    assert {"chain_forward", "chain_backward"} <= set(simulator.launches)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels(case: Case, target: int) -> None:
    simulator = Simulator(target)
    run(case, simulator)
    assert ("chain_jvp" in simulator.launches) == (case.hidden <= mlp.widest("jvp", case.dtype))


@pytest.mark.slow
@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", SLOW, ids=str)
def test_more_shapes(case: Case, target: int) -> None:
    run(case, Simulator(target))


@pytest.mark.parametrize(
    ("case", "cuts"),
    [
        (Case(1, 1, 70, 5, True, F32, 5), (20, 33)),
        (Case(1, 1, 37, 3, False, F64, 1), (17,)),
        (Case(1, 1, 37, 3, True, F64, 1), (1, 33)),
        (Case(2, 1, 12, 5, True, F32, 0), (5,)),
        (Case(6, 3, 36, 5, True, F32, 3), (6, 32)),  # tensor cores
        (Case(10, 7, 6, 5, True, F32, 2), (1, 3)),  # tiles
        (Case(1, 1, 36, 2, True, F32, 4, image=(2, 3)), (10, 33)),
        (Case(1, 1, 8, 2, False, F64, 1, image=(2, 3)), (3, 4)),
    ],
    ids=str,
)
def test_spans(case: Case, cuts: tuple[int, ...]) -> None:
    simulator = Simulator(90)
    with simulated(simulator):
        x = torch.empty(case.batch, 1, dtype=case.dtype)
        tensor_cores = not case.image and mlp.fragments("forward", x, case.hidden, case.offset)
        check_spans(case, CNN if case.image else MLP, cuts, tangent_bits=not tensor_cores)
    spans = 1 + len(cuts)
    assert simulator.launches.count("chain_forward") == (1 + spans) * (2 if case.segment == 0 else 1)
    assert simulator.launches.count("chain_backward") == 1 + spans


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("start", [0, 31, 2**40 + 5])
@pytest.mark.parametrize(("inputs", "image"), [(1, ()), (10, ()), (1, (2, 3))], ids=["lanes", "tiles", "cnn"])
def test_a_state_from_anywhere(inputs: int, image: tuple[int, ...], start: int, offset: bool) -> None:
    case = Case(inputs, 6 if inputs > 1 else 1, 6, 5, offset, F64, 2, image=image)
    with simulated(Simulator(80)):
        check_state(case, CNN if image else MLP, start)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 35, 5, True, F32, 2),
        Case(10, 6, 3, 3, True, F64, 2),
        Case(6, 3, 35, 33, True, F32, 2),
        Case(1, 1, 4, 3, True, F32, 2, image=(3, 5)),
        Case(1, 1, 3, 2, False, F64, 1, image=(7, 5)),
    ],
    ids=str,
)
def test_random_warp_order(case: Case, seed: int) -> None:
    def start(key: Any, options: list[Block], samples: int, device: Any, start: Any) -> None:
        size = 32 if options[0].fragments else 64
        start(Block(4, 2) if case.image else replace(options[0], samples=size, warps=2))

    run(case, Simulator(80, mode="warp", seed=seed), choose_block=start)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize(
    "case",
    [Case(3, 2, 200, 20, True, F32, 9), Case(5, 2, 200, 20, True, F32, 9), Case(10, 5, 70, 20, True, F32, 0)],
    ids=str,
)
def test_tensor_cores_are_as_accurate_as_float32(case: Case, target: int) -> None:
    """Against float64, no result is more than twice as far off as the reference in float32."""
    inputs, settings = draw_inputs(case), (SCALE, case.offset, case.out_features, 0)
    grad = draw(case.batch, case.out_features, dtype=F32, seed=8)

    def results(forward: Any, backward: Any, cast: Any) -> list[Any]:
        out, saved = forward(*cast(inputs), *settings, case.segment)
        return [out, *backward(*cast((grad, *inputs)), saved, *settings, case.segment, True, True)]

    simulator = Simulator(target)
    with simulated(simulator), mock.patch.object(triton_common, "capability", return_value=target):
        actual = results(MLP[0], MLP[1], tuple)
    assert simulator.launches.count("pack") == (3 if case.segment == 0 else 2)
    truth = results(MLP_TRUTH.forward, MLP_TRUTH.backward, doubled)
    reference = results(MLP_TRUTH.forward, MLP_TRUTH.backward, tuple)
    for name, a, r, t in zip(("out", *NAMES), actual, reference, truth, strict=True):
        scale = t.abs().max()
        error, other = ((value.double() - t).abs().max() / scale for value in (a, r))
        assert error <= 2 * other + 2e-7, f"{name}: {error:.1e}, in float32 {other:.1e}"


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
def test_tensor_cores_keep_a_weight_that_is_not_a_number(bits: int) -> None:
    inputs = list(draw_inputs(Case(3, 2, 4, 20, True, F32, 0)))
    inputs[3][0, 0, 0] = torch.tensor(bits, dtype=torch.int32).view(F32)
    simulator = Simulator(90)
    with simulated(simulator):
        out = MLP[0](*inputs, SCALE, True, 2, 0, 0)[0]
    assert "pack" in simulator.launches
    assert out.isnan().all()


WHOLE = [  # with samples a lane and an architecture
    (Case(1, 1, 37, 37, True, F32, 5), 1, 90),  # crosses a move of the base; ragged block and last segment
    (Case(2, 1, 10, 68, True, F32, 4), 2, 80),
    (Case(1, 2, 35, 4, True, F64, 6), 1, 90),
    (Case(2, 1, 6, 33, False, F32, 1), 2, 90),
    (Case(1, 1, 3, 5, True, F64, 1), 1, 80),  # one layer
    (Case(1, 1, 5, 5, False, F64, 2, width=2), 2, 90),
]


@contextmanager
def whole(simulator: Simulator, a_lane: int, room: int = 1 << 20) -> Iterator[None]:
    """``chain_whole`` for any batch, with ``room`` bytes for the sums of its programs."""
    with (
        simulated(simulator),
        mock.patch.object(mlp, "_WHOLE_BATCH", 1),
        mock.patch.object(triton_backward, "fitting_block", return_value=Block(32 * a_lane, 1, 255, 1)),
        mock.patch.object(triton_backward, "scratch_bytes", return_value=room // 2),
    ):
        yield


@pytest.mark.parametrize(("case", "a_lane", "target"), WHOLE, ids=str)
def test_a_backward_in_one_launch(case: Case, a_lane: int, target: int) -> None:
    """At most twice as far from float64 as the reference is; some gradients alone have the bits of all."""
    inputs, settings = draw_inputs(case), (SCALE, case.offset, case.out_features, 0)
    grad = draw(case.batch, case.out_features, dtype=case.dtype, seed=8)
    saved = MLP_TRUTH.forward(*inputs, *settings, case.segment)[1]
    arguments = grad, *inputs, saved, *settings, case.segment
    simulator = Simulator(target, mode="lockstep" if target == 90 else "warp")
    with whole(simulator, a_lane):
        actual = MLP[1](*arguments, True, True)
        again = case.segment > 1
        expected = ["pack", *["chain_recompute"] * again, "chain_whole", "add_sums"]
        assert simulator.launches == expected
        if a_lane == 1:
            simulator.launches.clear()
            alone = MLP[1](*arguments, True, False)[0]
            assert simulator.launches == expected[:-1]
            assert torch.equal(alone, actual[0])
    truth = MLP_TRUTH.backward(*doubled(arguments), True, True)
    for name, a, r, t in zip(NAMES, actual, MLP_TRUTH.backward(*arguments, True, True), truth, strict=True):
        assert a.dtype == case.dtype
        scale = t.abs().max() + 1e-30
        error, other = ((value.double() - t).abs().max() / scale for value in (a, r))
        bound = 2 * other + (2e-7 if case.dtype == F32 else 1e-14)
        assert error <= bound, f"{name}: {error:.1e}, the reference {other:.1e}"


def test_bits_of_a_backward_in_one_launch() -> None:
    """They depend neither on checkpoints nor on how many layers a launch takes."""
    case = Case(1, 1, 12, 37, True, F32, 0)
    inputs, settings = draw_inputs(case), (SCALE, True, 1, 0)
    grad = draw(case.batch, 1, dtype=F32, seed=8)
    found = []
    for segment, room, launches in ((1, 1 << 20, 1), (4, 1 << 20, 1), (3, 1, 4)):
        simulator = Simulator(90)
        with whole(simulator, 1, room):
            saved = MLP[0](*inputs, *settings, segment)[1]
            found.append(MLP[1](grad, *inputs, saved, *settings, segment, True, True))
        assert simulator.launches.count("chain_whole") == simulator.launches.count("add_sums") == launches
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("case", "cuts"),
    [(Case(1, 1, 37, 5, True, F32, 5), (20, 33)), (Case(1, 1, 9, 3, False, F64, 1), (3, 6))],
    ids=str,
)
def test_spans_in_one_launch(case: Case, cuts: tuple[int, ...]) -> None:
    """Those that begin with a state, too, which is not saved again."""
    simulator = Simulator(90)
    with whole(simulator, 1, 1 if case.segment == 1 else 1 << 20):
        check_spans(case, MLP, cuts)
    assert "chain_backward" not in simulator.launches


SMALL_IMAGES = [
    Case(1, 1, 4, 5, True, F32, 2, image=(5, 4)),  # rows in lanes, four samples a warp, the last warp ragged
    Case(1, 1, 3, 9, True, F32, 1, image=(4, 4)),  # no lane to spare
    Case(2, 1, 3, 3, False, F32, 1, image=(5, 5), tap=5, width=2),  # neighbours two strips away
    Case(2, 3, 3, 17, True, F32, 1, image=(2, 3)),  # channels take turns
    Case(1, 1, 3, 33, True, F32, 1, image=(1, 1), tap=1),
]


@pytest.mark.parametrize("case", SMALL_IMAGES, ids=str)
def test_small_images(case: Case) -> None:
    """Several samples a warp, and the bits of the way through scratch memory."""
    chosen = []

    def most_samples(*args: Any) -> None:
        chosen.append(args[1][0])
        args[-1](chosen[-1])

    run(case, Simulator(90), choose_block=most_samples)
    assert all(block.shuffled for block in chosen)
    found = []
    for choose in (most_samples, lambda *args: args[-1](Block(4, 2))):
        with simulated(Simulator(90), choose_block=choose):
            inputs = draw_inputs(case)
            out, saved = CNN[0](*inputs, 10.0, case.offset, case.out_features, 0, case.segment)
            arguments = (*inputs, saved, 10.0, case.offset, case.out_features, 0, case.segment, True, True)
            found.append((out, saved, *CNN[1](out, *arguments)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


SECONDS = [
    SecondCase(Case(1, 1, 37, 37, True, F32, 0)),
    SecondCase(Case(1, 1, 36, 36, False, F64, 0), first=False, last=False, start=31),
    SecondCase(Case(1, 2, 5, 5, True, F64, 0), first=False, start=62),
    SecondCase(Case(2, 2, 5, 1, False, F32, 0), last=False),
    SecondCase(Case(5, 3, 5, 5, True, F32, 0), last=False),  # tiles of 16 units
    SecondCase(Case(10, 7, 4, 17, True, F32, 0), given=0b11101111),
    SecondCase(Case(10, 5, 4, 5, False, F64, 0), first=False),
    SecondCase(Case(1, 1, 6, 5, True, F32, 0), given=0b11001111),
    SecondCase(Case(1, 1, 35, 3, True, F32, 0, image=(3, 5))),
    SecondCase(Case(2, 1, 4, 2, False, F64, 0, image=(3, 3)), first=False),
    SecondCase(Case(1, 1, 4, 2, True, F64, 0, image=(2, 3)), last=False, given=0b11101111),
    SecondCase(Case(1, 1, 4, 1, False, F32, 0, image=(2, 3), tap=5), first=False, last=False, start=30),
]


def run_second(second: SecondCase, simulator: Simulator, **limits: Any) -> None:
    image = second.case.image
    with simulated(simulator, **limits):
        check_second(second, cnn.cnn_backward_jvp if image else mlp.mlp_backward_jvp)
    assert {"chain_tangents", "chain_backward_jvp"} <= set(simulator.launches)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("second", SECONDS, ids=str)
def test_second_derivatives(second: SecondCase, target: int) -> None:
    run_second(second, Simulator(target))


@pytest.mark.parametrize(
    ("case", "cuts"),
    [
        (Case(1, 1, 37, 5, True, F32, 0), (20, 33)),
        (Case(1, 1, 9, 3, False, F64, 0), (1,)),
        (Case(5, 3, 4, 2, True, F32, 0), (1,)),  # tiles
        (Case(1, 1, 8, 2, True, F32, 0, image=(2, 3)), (3, 4)),
    ],
    ids=str,
)
def test_second_derivatives_of_spans(case: Case, cuts: tuple[int, ...]) -> None:
    with simulated(Simulator(90)):
        op = cnn.cnn_backward_jvp if case.image else mlp.mlp_backward_jvp
        # Of 9 units forward runs on tensor cores, second derivatives in tiles.
        check_second_spans(case, CNN if case.image else MLP, op, cuts, bits=case.hidden < 9)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("second", [SECONDS[2], SECONDS[6], SECONDS[9], SECONDS[10]], ids=str)
def test_second_derivatives_in_random_warp_order(second: SecondCase, seed: int) -> None:
    block = Block(4 if second.case.image else 64, 2)
    run_second(second, Simulator(80, mode="warp", seed=seed), choose_block=lambda *args: args[-1](block))


def test_second_derivatives_in_groups() -> None:
    """Several samples a lane; groups of one segment of three layers."""
    simulator = Simulator(90)
    limits: dict[str, Any] = {"choose_block": lambda *a: a[-1](a[1][0]), "scratch_bytes": lambda device: 1}
    run_second(SecondCase(Case(1, 1, 12, 516, True, F32, 0)), simulator, **limits)
    assert simulator.launches.count("chain_backward_jvp") == 4


GRAMS = [
    GramCase(Case(1, 1, 6, 5, True, F32, 0), 3, 0),
    GramCase(Case(2, 1, 3, 3, True, F64, 0), 2, 1, trainable=0b110111),
    GramCase(Case(1, 1, 4, 3, True, F32, 0, image=(2, 3)), 2, 0),
    GramCase(Case(1, 2, 3, 2, False, F64, 0, image=(3, 2), width=7), 0, 2, trainable=0b011011),  # two groups of rows
]


def run_gram(case: GramCase, simulator: Simulator, **limits: Any) -> None:
    load()
    stand_ins: dict[str, Any] = {"launch": simulator.launch, "empty": simulator.empty}
    with mock.patch.multiple(triton_chain, **stand_ins | limits), mock.patch.multiple(gram, **stand_ins):
        check_gram(case, gram.cnn_gram if case.case.image else gram.mlp_gram)
    expected = {"filter_jacobians", "pair_sums"} if case.case.image else {"gram_sums"}
    assert expected <= set(simulator.launches)


@pytest.mark.parametrize("target", [80, 90])
@pytest.mark.parametrize("case", [*GRAMS, GramCase(Case(1, 2, 4, 18, False, F64, 0), 0, 0)], ids=str)
def test_gram(case: GramCase, target: int) -> None:
    run_gram(case, Simulator(target))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", GRAMS[1:], ids=str)
def test_gram_in_random_warp_order(case: GramCase, seed: int) -> None:
    samples = 4 if case.case.image else 32
    run_gram(case, Simulator(80, mode="warp", seed=seed), choose_block=lambda *args: args[-1](Block(samples, 2)))


def test_gram_in_parts() -> None:
    """Groups of one segment, Jacobians of one layer at a time."""
    simulator = Simulator(90)
    run_gram(GramCase(Case(1, 1, 6, 2, True, F64, 0, image=(2, 1)), 0, 0), simulator, scratch_bytes=lambda device: 1)
    assert simulator.launches.count("chain_backward") == 2
    assert simulator.launches.count("pair_sums") == 6  # every layer's own


@pytest.mark.parametrize("dtype", [F32, F64])
def test_blocks_for_large_batches(dtype: torch.dtype) -> None:
    """Several samples a lane, groups of segments in several launches, weight gradients in several parts."""
    weight = torch.empty(7, 3, 3, dtype=dtype)
    largest = mlp.blocks("backward", weight[0], weight, True)[0]
    assert largest.samples >= 2 * 32 * largest.warps
    case = Case(1, 1, 9, 2 * 512 + 4 if largest.samples < 512 else largest.samples + 4, True, dtype, 2)
    simulator = Simulator(90)
    group = 2 * 2 * 2 * 3 * case.batch * dtype.itemsize  # bytes of h and g of two segments of two states
    run(case, simulator, choose_block=lambda *args: args[-1](args[1][0]), scratch_bytes=lambda device: group)
    assert simulator.launches.count("chain_recompute") == 2 * 2
