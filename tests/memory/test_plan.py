"""Plans against the ops that they describe, numbers worked out by hand, and budgets against brute force."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.chain import schedule
from narrowdeep.memory import BudgetError, MemoryPlan, plan, sizes, step


def smallest_budget(model: DeepNarrowMLP, batch: int) -> int:
    with pytest.raises(BudgetError) as caught:
        plan(model, batch_size=batch, budget=1)
    assert str(caught.value.smallest) in str(caught.value)
    return caught.value.smallest


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (1, 1),
        ("7", 7),
        ("500MB", 500_000_000),
        ("500 mb", 500_000_000),
        ("2GiB", 2 << 30),
        (" 2.5 KiB ", 2560),
        ("1.5kB", 1500),
        ("1e3B", 1000),
        ("3TiB", 3 << 40),
        ("9007199254740993", 9007199254740993),  # 2^53 + 1: no float on the way
    ],
)
def test_parse_bytes(text: int | str, count: int) -> None:
    assert sizes.parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "GiB", "2GB4", "2 gigs", "-1GB", "nan", "inf", "1e999GB", "0", "0.2", 0, -5, "2,5GB"]
)
def test_nonsense_budgets_are_refused(text: int | str) -> None:
    with pytest.raises(ValueError, match="^budget must be"):
        plan(DeepNarrowMLP(2, 1, 5), batch_size=1, budget=text)


@pytest.mark.parametrize("value", [2.5, True, [1], torch.tensor(5)])
def test_budgets_of_other_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError, match="budget must be bytes as an int, or text"):
        plan(DeepNarrowMLP(2, 1, 5), batch_size=1, budget=value)  # type: ignore[arg-type]


@given(st.integers(1, 2**50))
def test_format_bytes_keeps_three_digits(count: int) -> None:
    text = sizes.format_bytes(count)
    assert abs(sizes.parse_bytes(text) - count) <= 0.005 * count + 1
    assert len(text) <= 8


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("depth", [2, 3, 129])
@pytest.mark.parametrize("batch", [1, 37])
@pytest.mark.parametrize("checkpoint", ["auto", "none", 2, 5, 200])
def test_boundaries_are_what_the_op_saves(form, dtype, depth, batch, checkpoint) -> None:
    model = DeepNarrowMLP(3, 1, depth, form=form, dtype=dtype, checkpoint=checkpoint)
    planned = plan(model, batch_size=batch)
    x = torch.randn(batch, 3, dtype=dtype)
    span = (model.scale, form == "offset", model.out_features, 0, model.segment(batch))
    saved = torch.ops.narrowdeep.mlp_forward(x, *model.stacked(), *span)[1]
    assert planned.segment == model.segment(batch)
    assert planned.parts["boundaries"] == saved.numel() * saved.element_size()
    assert planned.snapshots == saved.shape[0]
    assert planned.schedule is None


def test_image_boundaries_are_what_the_op_saves() -> None:
    model = DeepNarrowCNN(2, 1, 9, checkpoint=3)
    x = torch.randn(5, 2, 4, 3)
    saved = torch.ops.narrowdeep.cnn_forward(x, *model.stacked(), model.scale, True, model.out_channels, 0, 3)[1]
    planned = plan(model, batch_size=5, input_shape=(2, 4, 3))
    assert planned.parts["boundaries"] == saved.numel() * 4
    assert planned.parts["input and output"] == 4 * (5 * 2 * 4 * 3 + 2 * 5)


def test_parts_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 13, 7 layers, 5 samples in float64 with scalar kernels on one thread: tiles of 3 samples, 2 of them."""
    monkeypatch.setenv("NARROWDEEP_ISA", "scalar")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model = DeepNarrowMLP(8, 4, 7, dtype=torch.float64, checkpoint=2)
    numbers = 13 * 8 + 13 + 5 * (13 * 13 + 13) + 4 * 13 + 4
    tile = 13 * 3
    assert plan(model, batch_size=5, optimizer="adam").parts == {
        "parameters": 8 * numbers,
        "gradients": 8 * numbers,
        "optimizer state": 16 * numbers,
        "input and output": 8 * 5 * (8 + 4 + 4),
        "boundaries": 8 * 3 * 2 * 13 * 5,  # before hidden layers 0, 2, 4, in two parts
        "backward state": 8 * 2 * (3 * tile + 12 * 3),
        # The state, base and floor of G, 2 layers and what is before them, G before and after a layer; h transposed.
        "workspace": 8 * ((4 + 2 + 3 + 2) * tile + 14 * 3),
    }


def test_what_a_budget_does_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CACHE_BYTES", 1 << 40)
    model = DeepNarrowMLP(2, 1, 500, checkpoint=7)
    free, tight = plan(model, batch_size=256), plan(model, batch_size=256, budget="1 GiB")
    for part in ("parameters", "gradients", "optimizer state", "input and output"):
        assert free.parts[part] == tight.parts[part]
    assert model.checkpoint == 7
    assert (free.segment, free.forward_sweeps) == (7, 2.0)
    assert free.slow_down == pytest.approx(4 / 3)
    assert (tight.segment, tight.forward_sweeps, tight.slow_down) == (1, 1.0, 1.0)
    for p in model.parameters():
        p.requires_grad_(False)
    assert plan(model, batch_size=256).parts["gradients"] == 0


def test_gradients_of_chunks_that_are_used_at_once() -> None:
    model = DeepNarrowMLP(2, 1, 102, chunks=8, dtype=torch.float64)  # 100 hidden layers: chunks of 12 and 13
    layer = 8 * (4 * 4 + 4)
    parts = plan(model, batch_size=5, optimizer="fused-momentum").parts
    assert parts["gradients"] == 13 * layer
    assert parts["optimizer state"] == parts["parameters"] == 100 * layer + 8 * (4 * 2 + 4 + 4 + 1)
    assert plan(model, batch_size=5).parts["gradients"] == parts["parameters"]
    whole = DeepNarrowMLP(2, 1, 102, dtype=torch.float64)
    assert plan(whole, batch_size=5, optimizer="fused-sgd").parts["gradients"] == parts["parameters"]
    model.requires_grad_(False)
    assert plan(model, batch_size=5, optimizer="fused-sgd").parts["gradients"] == 0


@pytest.mark.parametrize(("cache", "first_choice"), [(0, step.AUTO_SEGMENT), (1 << 40, 1)])
def test_every_state_is_saved_where_that_is_fastest(
    monkeypatch: pytest.MonkeyPatch, cache: int, first_choice: int
) -> None:
    monkeypatch.setattr(step, "CACHE_BYTES", cache)
    model = DeepNarrowMLP(6, 3, 3000, checkpoint="none")
    everything = plan(model, batch_size=1000).total
    assert plan(model, batch_size=1000, budget="1TB").segment == first_choice
    assert plan(model, batch_size=1000, budget=everything).segment == first_choice
    assert plan(model, batch_size=1000, budget=everything - 1).segment == step.AUTO_SEGMENT


def test_a_convolution_segment_too_long_to_hold_runs_once_more() -> None:
    model = DeepNarrowCNN(1, 1, 2000, checkpoint=200)
    held = plan(model, batch_size=64, input_shape=(1, 7, 7))
    assert held.forward_sweeps == 2.0
    model.checkpoint = 999
    divided = plan(model, batch_size=64, input_shape=(1, 7, 7))
    assert 2.5 < divided.forward_sweeps < 3.0
    assert divided.slow_down > held.slow_down


@given(
    st.integers(2, 200), st.integers(1, 300), st.sampled_from([(2, 1), (7, 9)]), st.sampled_from(["offset", "plain"])
)
def test_smallest_budget(depth: int, batch: int, shape: tuple[int, int], form) -> None:
    model = DeepNarrowMLP(*shape, depth, form=form)
    smallest = smallest_budget(model, batch)
    assert plan(model, batch_size=batch, budget=smallest).total == smallest
    with pytest.raises(BudgetError):
        plan(model, batch_size=batch, budget=smallest - 1)
    if shape == (7, 9):  # widths up to 8 trade memory for fewer passes in steps, which a search of few lengths may miss
        totals = []
        for checkpoint in ("none", *range(2, depth + 1), *((segment, 1) for segment in range(2, depth))):
            model.checkpoint = checkpoint
            totals.append(plan(model, batch_size=batch).total)
        assert smallest == min(totals)


@given(st.integers(2, 400), st.integers(1, 3000), st.integers(0, 4_000_000), st.integers(0, 4_000_000))
def test_more_memory_is_never_slower(depth: int, batch: int, a: int, b: int) -> None:
    model = DeepNarrowMLP(5, 4, depth)
    smallest = smallest_budget(model, batch)
    plans: list[MemoryPlan] = []
    for budget in sorted((smallest + a, smallest + b)):
        plans.append(plan(model, batch_size=batch, budget=budget))
        assert plans[-1].total <= budget
    assert plans[1].slow_down <= plans[0].slow_down


@settings(max_examples=30)
@given(st.integers(3, 5000), st.integers(2, 100), st.integers(1, 50))
def test_a_schedule_that_the_model_asks_for(depth: int, segment: int, snapshots: int) -> None:
    model = DeepNarrowCNN(1, 1, depth, checkpoint=(segment, snapshots))
    planned = plan(model, batch_size=400, input_shape=(1, 6, 6))
    length = -(-(depth - 2) // min(segment, depth))
    if snapshots >= length:
        assert planned.schedule is None
        return
    assert planned.checkpoint == (segment, snapshots)
    assert planned.schedule == schedule.Binomial(min(segment, depth), snapshots)
    cost = planned.schedule.cost(depth - 2)
    assert cost.snapshots == snapshots
    assert planned.parts["boundaries"] == (snapshots - 1) * 3 * 3 * 36 * 400 * 4  # the first is x
    # Besides what the schedule advances: the last segment on the way to the output, and every segment once, reversed.
    assert planned.forward_sweeps == pytest.approx((cost.advances + 1 + length) / length)


def test_saving_every_state_is_slower_the_less_a_number_costs_to_compute() -> None:
    slow_downs = [
        plan(DeepNarrowMLP(width - 2, 1, 1000, checkpoint=64), batch_size=4000).slow_down for width in (4, 75, 795)
    ]
    assert slow_downs == sorted(slow_downs)
    assert slow_downs[0] == pytest.approx(1 / 3, rel=0.05)  # as measured
    assert slow_downs[2] > 1.2  # all but the cost of running it again


@pytest.mark.usefixtures("threads")
def test_a_schedule_is_chosen_where_it_wins() -> None:
    """The choice under a budget is the fastest of all that fit, by the numbers of the plans themselves."""
    torch.set_num_threads(2)  # each thread has room of its own
    model = DeepNarrowMLP(64, 10, 400)

    def planned(checkpoint: Any, **arguments: Any) -> MemoryPlan:
        model.checkpoint = checkpoint
        return plan(model, batch_size=500, **arguments)

    everything = planned("none")
    schedules = [planned((2**i, snapshots)) for i in range(1, 9) for snapshots in range(1, -(-398 // 2**i))]
    others = [planned(segment) for segment in range(2, 399)]
    least = min(p.total for p in schedules)
    chosen = []
    for share in (0.0, 0.02, 0.05, 0.2, 1.0):
        budget = int(least + share * (everything.total - least))
        found = planned("auto", budget=budget)
        fitting = [p for p in (everything, *schedules, *others) if p.total <= budget]
        assert found.total <= budget
        assert found.slow_down == pytest.approx(min(p.slow_down for p in fitting))
        chosen.append(found.schedule is not None)
    assert chosen == [True, True, True, False, False]
    assert planned("auto", budget=budget, schedules=False).schedule is None


def test_table_and_json_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "CACHE_BYTES", 1 << 40)
    planned = plan(DeepNarrowMLP(2, 1, 1000, checkpoint=50), batch_size=64, budget="100 MiB", optimizer="momentum")
    rows = dict(line.split("  ", 1) for line in str(planned).splitlines())
    rows = {name: text.strip() for name, text in rows.items()}
    assert rows["total"] == sizes.format_bytes(planned.total)
    assert rows["budget"] == "100 MiB"
    assert rows["saved"] == "every state"
    data = json.loads(json.dumps(planned.to_dict()))
    assert sum(data["bytes"].values()) == data["total_bytes"] == planned.total
    assert data["bytes"]["optimizer state"] == data["bytes"]["parameters"]
    assert data["activation_bytes"] == planned.activations


def test_no_memory_is_needed_to_plan() -> None:
    model = DeepNarrowMLP(784, 10, 4000, device="meta")
    planned = plan(model, batch_size=128, budget="24GB")
    assert planned.parts["parameters"] > 10_000_000_000


@pytest.mark.parametrize("model", [(DeepNarrowMLP, (2,)), (DeepNarrowCNN, (2, 7, 5))], ids=["mlp", "cnn"])
def test_a_plan_is_of_the_device_that_is_said(model: tuple[type, tuple[int, ...]]) -> None:
    network, shape = model
    there, nowhere = (network(2, 1, 300, checkpoint=20, device=device) for device in ("cpu", "meta"))
    settings: dict = {"batch_size": 9, "input_shape": shape}
    cpu, cuda = (plan(nowhere, **settings, device=torch.device(name)) for name in ("cpu", "cuda:1"))
    assert cpu == plan(nowhere, **settings) == plan(there, **settings)
    assert cuda == plan(there, **settings, device="cuda")
    assert cuda.parts["backward state"] == 8 * 4 * 9 * math.prod(shape[1:]) * (2 + 1 + 1)  # 8 states of 9 samples
    assert {name for name, size in cpu.parts.items() if size != cuda.parts[name]} <= {"backward state", "workspace"}


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:x", 3.5])
def test_a_plan_is_of_a_device_that_runs_chains(device: object) -> None:
    with pytest.raises(ValueError, match="device must be cpu, cuda or cuda:N, got "):
        plan(DeepNarrowMLP(2, 1, 4), batch_size=1, device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 4, "input_shape": (4,)}, r"input_shape must be \(3,\), got \(4,\)"),
        ({"batch_size": 4, "input_shape": (3, 2, 2)}, r"input_shape must be \(3,\)"),
        ({"batch_size": 4, "optimizer": "lion"}, "optimizer must be one of sgd, .*, got 'lion'"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(DeepNarrowMLP(3, 1, 4), **arguments)


def test_images_need_a_shape() -> None:
    for shape in (None, (2, 5), (3, 5, 5), (2, 0, 5), (2, 5.0, 5)):
        with pytest.raises(ValueError, match=r"input_shape must be \(2, H, W\), got"):
            plan(DeepNarrowCNN(2, 1, 4), batch_size=1, input_shape=shape)  # type: ignore[arg-type]


def test_other_models_are_refused() -> None:
    with pytest.raises(TypeError, match="model must be a DeepNarrowMLP or a DeepNarrowCNN, got Linear"):
        plan(nn.Linear(2, 2), batch_size=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"batch_size must be an int, got 2\.0"):
        plan(DeepNarrowMLP(3, 1, 4), batch_size=2.0)  # type: ignore[arg-type]
