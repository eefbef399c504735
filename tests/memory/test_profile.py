"""Measured peaks: that the measurement measures, that the plan agrees with it, and that nothing is left behind."""

from __future__ import annotations

import importlib
import json
import mmap
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import agrees
from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.memory import BudgetError, MemoryProfile, plan, profile
from narrowdeep.ops import engine
from narrowdeep.optim import FusedSGD

profiling: Any = importlib.import_module("narrowdeep.memory.profiling")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the process's peak can be reset on Linux only")

MEGABYTE = 1 << 20


@pytest.mark.parametrize("megabytes", [20, 200])
def test_growth_is_the_peak_and_not_what_stays(megabytes: int) -> None:
    def run() -> None:
        large = torch.ones(megabytes * MEGABYTE, dtype=torch.uint8)
        del large
        small = torch.ones(5 * MEGABYTE, dtype=torch.uint8)
        del small

    # Blocks under 32 MiB come from the heap by now, and these leave holes in it that both of run's blocks fit into.
    blocks = [torch.ones(30 * MEGABYTE, dtype=torch.uint8) for _ in range(4)]
    del blocks[2], blocks[0]
    growth = profiling._peak_growth(run, torch.device("cpu"))
    assert abs(growth - megabytes * MEGABYTE) < 2 * MEGABYTE


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no huge pages")
def test_a_touch_counts_as_a_page_and_not_as_a_huge_one() -> None:
    def run() -> None:
        with mmap.mmap(-1, 8 * MEGABYTE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as region:
            region.madvise(mmap.MADV_HUGEPAGE)
            region[5 * MEGABYTE] = 1

    assert profiling._peak_growth(run, torch.device("cpu")) < MEGABYTE


@pytest.mark.usefixtures("threads")
def test_a_backward_takes_no_more_than_it_costs_where_it_has_more_outputs_than_channels() -> None:
    torch.set_num_threads(1)
    channels, outputs, layers, segment, image = 2, 300, 4, 10, (64, 64)
    x, weight = torch.rand(1, 1, *image), torch.rand(layers, channels, channels, 3, 3)
    params = (
        *(torch.rand(channels, 1, 3, 3), torch.rand(channels)),
        *(weight, torch.rand(layers, channels)),
        *(torch.rand(outputs, channels, 3, 3), torch.rand(outputs)),
    )
    ops, settings = torch.ops.narrowdeep, (1.0, False, outputs, 0, segment)
    saved = ops.cnn_forward(x, *params, *settings)[1]
    arguments = (torch.rand(1, outputs), x, *params, saved, *settings, True, True)
    ops.cnn_backward(*arguments)  # what is loaded on first use
    growth = profiling._peak_growth(lambda: ops.cnn_backward(*arguments), torch.device("cpu"))
    sizes = (1, 1, channels, outputs, layers, segment, 3, *image)
    costs = engine.backward_costs(sizes, (True, True, False, True, False, True), 1)
    results = profiling._bytes_of([x, *params])
    assert growth < costs.kept + costs.segment + results + MEGABYTE


@pytest.mark.parametrize(
    ("features", "depth", "batch"), [((2, 1), 1500, 4096), ((64, 10), 100, 1024), ((784, 10), 20, 256)]
)
@pytest.mark.parametrize("checkpoint", ["none", 64, 200])
def test_plan_agrees_with_the_measurement(features: tuple[int, int], depth: int, batch: int, checkpoint) -> None:
    model = DeepNarrowMLP(*features, depth, checkpoint=checkpoint)
    measured = profile(model, torch.randn(batch, features[0]), eager=False)
    assert agrees(measured), measured


@pytest.mark.parametrize(("channels", "depth"), [((1, 1), 300), ((1, 10), 100)])
@pytest.mark.parametrize("checkpoint", ["none", 64, 290])
def test_plan_of_images_agrees_with_the_measurement(channels: tuple[int, int], depth: int, checkpoint) -> None:
    model = DeepNarrowCNN(*channels, depth, checkpoint=checkpoint)
    measured = profile(model, torch.rand(200, channels[0], 7, 7), eager=False)
    assert agrees(measured), measured


def test_eager_layers_keep_every_state() -> None:
    model = DeepNarrowMLP(2, 1, 200, checkpoint=14)
    x = torch.randn(8192, 2)
    measured = profile(model, x)
    states = 199 * 4 * 8192 * 4
    assert measured.eager is not None
    assert states < measured.eager < 2.5 * states
    assert measured.measured < 0.3 * states
    assert profile(model, x, eager=False).eager is None


def test_eager_layers_are_left_out_where_they_might_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_free_bytes", lambda device: 2 * 19 * 8 * 4 * 4)
    assert profile(DeepNarrowMLP(2, 1, 20), torch.randn(8, 2)).eager is None


def test_nothing_is_left_behind() -> None:
    model = DeepNarrowMLP(2, 1, 30)
    model.first_bias.grad = torch.full((4,), 7.0)
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    profile(model, torch.randn(16, 2, generator=torch.Generator()))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.first_bias.grad, torch.full((4,), 7.0))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["first_bias"]
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.detach(), q)


@pytest.mark.parametrize("chunks", [1, 3])
def test_an_optimizer_that_steps_inside_backward_does_not(chunks: int) -> None:
    model = DeepNarrowMLP(2, 1, 30, chunks=chunks).eval()
    optimizer = FusedSGD(model, lr=1e-3, momentum=0.9)
    x = torch.rand(16, 2, requires_grad=True)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        profile(model, x)
    assert not optimizer.state
    assert not model.training
    assert x.grad is None
    for p, q in zip(model.parameters(), before, strict=True):
        assert p.grad is None
        assert torch.equal(p.detach(), q)
    model(x).sum().backward()  # and it still steps
    assert not torch.equal(model.last_bias.detach(), before[-1 if chunks == 1 else 3])


@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize(("chunks", "checkpoint"), [(4, 64), (4, 10), (1, (10, 3))])
def test_what_is_planned_for_several_nodes_is_enough(form: Any, chunks: int, checkpoint: Any) -> None:
    x = torch.rand(16384, 2)
    models = [(DeepNarrowMLP(2, 1, 300, form=form, checkpoint=checkpoint, chunks=chunks), x)]
    image = torch.rand(2048, 1, 7, 7)
    DeepNarrowCNN(1, 1, 9, chunks=2)(image).sum().backward()  # what torch loads for its first convolution of a size
    models.append((DeepNarrowCNN(1, 1, 100, form=form, checkpoint=checkpoint, chunks=chunks), image))  # type: ignore[arg-type]
    for model, inputs in models:
        measured = profile(model, inputs, eager=False)
        assert measured.measured <= 1.05 * measured.plan.total, measured


def test_what_is_planned_for_strips_of_wide_images_is_enough() -> None:
    """A strip is a row of 8192 positions here, with six rows of its neighbours beside it, which a 7x7 filter sees."""
    model = DeepNarrowCNN(1, 1, 4, kernel_size=7, checkpoint="none")
    measured = profile(model, torch.rand(1, 1, 16, 8192), eager=False)
    assert measured.measured <= 1.02 * measured.plan.total, measured


def test_a_budget_holds_with_chunks() -> None:
    x = torch.rand(16384, 2)
    model = DeepNarrowMLP(2, 1, 300, chunks=4)
    with pytest.raises(BudgetError) as caught:
        plan(model, batch_size=len(x), budget=1)
    model.budget = int(1.1 * caught.value.smallest)
    measured = profile(model, x, eager=False)
    assert measured.measured <= model.budget
    assert measured.plan.budget == model.budget
    model.budget = caught.value.smallest - 1
    with pytest.raises(BudgetError):
        model(x)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("share", [0.01, 0.2, 1.0])
def test_a_budget_holds(share: float, optimizer: str) -> None:
    """What is measured and what the optimizer keeps fit, from schedules of few states to every state."""
    torch.set_num_threads(2)  # each thread has room of its own
    models = [(DeepNarrowMLP(64, 10, 600, optimizer=optimizer), torch.rand(2048, 64))]
    models.append((DeepNarrowCNN(1, 1, 1000, optimizer=optimizer), torch.rand(512, 1, 7, 7)))  # type: ignore[arg-type]
    for model, x in models:
        model(x[:9]).sum().backward()
        model.zero_grad(set_to_none=True)
        shape = {"batch_size": len(x), "input_shape": tuple(x.shape[1:])}
        with pytest.raises(BudgetError) as caught:
            plan(model, **shape, budget=1)  # type: ignore[arg-type]
        model.checkpoint = "none"
        every = plan(model, **shape).total  # type: ignore[arg-type]
        model.checkpoint = "auto"
        model.budget = int(caught.value.smallest + share * (every - caught.value.smallest))
        measured = profile(model, x, eager=False)
        kept = {"sgd": 0, "adam": 2}[optimizer] * sum(4 * p.numel() for p in model.parameters())
        assert measured.plan.parts["optimizer state"] == kept
        assert (measured.plan.schedule is not None) == (share < 0.1)
        assert measured.measured + kept <= model.budget + MEGABYTE, measured  # to which the measurement is exact


def test_table_json_and_plot(tmp_path: Path) -> None:
    profiles = [profile(DeepNarrowMLP(2, 1, depth), torch.randn(64, 2), eager=depth < 50) for depth in (10, 100)]
    lines = profiling.table(profiles).splitlines()
    assert [line.split()[0] for line in lines] == ["depth", "10", "100"]
    assert lines[2].split()[-1] == "-"
    assert str(profiles[0]) == profiling.table(profiles[:1])
    data = json.loads(json.dumps(profiles[1].to_dict()))
    assert (data["depth"], data["eager_bytes"], data["measured_bytes"]) == (100, None, profiles[1].measured)
    assert isinstance(profiles[0], MemoryProfile)
    pytest.importorskip("matplotlib")
    profiling.plot(profiles, tmp_path / "peak.png")
    assert (tmp_path / "peak.png").read_bytes().startswith(b"\x89PNG")


def test_bad_inputs() -> None:
    model = DeepNarrowMLP(2, 1, 5)
    with pytest.raises(ValueError, match=r"x must be a tensor with its batch in dimension 0, got shape \(2,\)"):
        profile(model, torch.zeros(2))
    with pytest.raises(TypeError, match="x must be a dense tensor, got torch.sparse_coo"):
        profile(model, torch.ones(2, 2).to_sparse())
    with pytest.raises(TypeError, match="x must be a dense tensor, got a nested one"):
        profile(model, torch.nested.nested_tensor([torch.ones(2), torch.ones(2)], layout=torch.jagged))
    with pytest.raises(ValueError, match="got list"):
        profile(model, [[1.0, 2.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2\), B at least 1, got \(4, 3\)"):
        profile(model, torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 2\), B at least 1, got \(0, 2\)"):
        profile(model, torch.zeros(0, 2))
