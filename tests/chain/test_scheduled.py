"""Chains that keep few states, under a binomial schedule: the same numbers, no more states than asked."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.chain import span
from narrowdeep.chain.family import FAMILIES
from narrowdeep.chain.schedule import fewest_advances, first_snapshots
from narrowdeep.functional import conv_chain, mlp_chain
from narrowdeep.memory import BudgetError, plan
from narrowdeep.ops.params import Affine

KINDS = ["mlp", "cnn"]


def _model(kind: str, **arguments: Any) -> DeepNarrowMLP | DeepNarrowCNN:
    arguments = {"depth": 61, "scale": 5.0, "dtype": torch.float64, **arguments}
    model = DeepNarrowMLP(3, 1, **arguments) if kind == "mlp" else DeepNarrowCNN(2, 1, **arguments)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def _x(kind: str, batch: int = 5, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (batch, 3) if kind == "mlp" else (batch, 2, 4, 3)
    return torch.rand(shape, dtype=dtype, requires_grad=True)


def _gradients(model: Any, x: Tensor, checkpoint: Any) -> list[Tensor]:
    model.checkpoint = checkpoint
    out = model(x)
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weight).sum(), [x, *model.parameters()])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize(("depth", "batch"), [(2, 3), (3, 1), (61, 0), (61, 1), (131, 37)])
@pytest.mark.parametrize("checkpoint", [(1, 1), (2, 3), (7, 2), (33, 1), (50, 9)])
def test_outputs_and_gradients_are_those_of_one_op(
    kind: str, form: Any, depth: int, batch: int, checkpoint: tuple[int, int]
) -> None:
    model, x = _model(kind, depth=depth, form=form), _x(kind, batch)
    for a, b in zip(_gradients(model, x, checkpoint), _gradients(model, x, "none"), strict=True):
        size = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * size)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(KINDS), st.integers(3, 90), st.integers(1, 40), st.integers(1, 12))
def test_any_schedule_gives_the_same(kind: str, depth: int, segment: int, snapshots: int) -> None:
    torch.manual_seed(depth)
    model, x = _model(kind, depth=depth), _x(kind)
    for a, b in zip(_gradients(model, x, (segment, snapshots)), _gradients(model, x, 8), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11 * b.abs().max().item())


@pytest.mark.parametrize("form", ["offset", "plain"])
def test_float32_convolutions_are_the_same_to_the_bit(form: Any) -> None:
    model, x = _model("cnn", depth=300, form=form, dtype=torch.float32), _x("cnn", 21, torch.float32)
    first_weight, first_bias, hidden_weight, hidden_bias, last_weight, last_bias = model.arguments()
    results = []
    for snapshots in (None, 3):
        out = span.chain(
            "cnn",
            x,
            Affine(first_weight, first_bias),
            [Affine(hidden_weight, hidden_bias)],
            Affine(last_weight, last_bias),
            5.0,
            form == "offset",
            7,
            snapshots,
        )
        results.append([out.detach(), *torch.autograd.grad(out.sum(), [x, *model.parameters()])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


class _Counting:
    """Raw ops that count the hidden layers run forward and the states that are alive."""

    def __init__(self, ops: Any) -> None:
        self.ops, self.advanced, self.most = ops, 0, 0
        self.alive: weakref.WeakSet[Tensor] = weakref.WeakSet()

    def forward(self, *args: Any) -> Any:
        self.advanced += args[3].shape[0]
        state, saved = self.ops.forward(*args)
        if args[5] is None:
            self.alive.add(state)
        self.most = max(self.most, len(self.alive))
        return state, saved

    def backward(self, *args: Any) -> Any:
        assert args[8].shape[0] == (args[2] is not None)  # nothing is saved but what the schedule keeps, and state 0
        return self.ops.backward(*args)


@pytest.mark.parametrize(
    ("length", "segment", "snapshots"), [(10, 3, 2), (40, 1, 1), (40, 2, 4), (17, 5, 3), (64, 1, 6)]
)
def test_as_few_layers_run_again_as_possible(
    monkeypatch: pytest.MonkeyPatch, length: int, segment: int, snapshots: int
) -> None:
    counting = _Counting(FAMILIES["cnn"].ops)
    monkeypatch.setitem(FAMILIES, "cnn", dataclasses.replace(FAMILIES["cnn"], ops=counting))  # type: ignore[arg-type]
    model = _model("cnn", depth=length * segment + 2, checkpoint=(segment, snapshots))
    x = _x("cnn")
    loss = model(x).sum()
    assert counting.advanced == length * segment
    kept = len(first_snapshots(length, snapshots))
    assert len(counting.alive) <= kept - 1  # x is kept as well
    loss.backward()
    again = length - 1 - first_snapshots(length, snapshots)[-1]  # from the state stored last to the last segment
    swept = fewest_advances(length, snapshots) - (length - 1)
    assert counting.advanced == (length + again + swept) * segment
    assert counting.most <= snapshots + 1
    del loss
    assert len(counting.alive) == 0


@pytest.mark.parametrize(("kind", "title"), [("mlp", "DeepNarrowMLP"), ("cnn", "DeepNarrowCNN")])
def test_the_graph_says_whose_node_it_is(kind: str, title: str) -> None:
    model, x = _model(kind), _x(kind)
    names = {}
    for checkpoint in ("auto", (4, 3)):
        model.checkpoint = checkpoint
        out = model(x)
        names[checkpoint] = out.grad_fn.name()
        with torch.profiler.profile() as profiler:
            out.sum().backward()
        assert any(event.key == names[checkpoint] for event in profiler.key_averages())
    assert names == {"auto": f"{title}Backward", (4, 3): f"{title}ScheduledBackward"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_is_kept_gives_the_same_again(kind: str) -> None:
    model, x = _model(kind, checkpoint=(4, 3)), _x(kind)
    loss = model(x).square().sum()
    grads = [torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for _ in range(3)]
    for again in grads[1:]:
        for a, b in zip(grads[0], again, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_parameters_and_inputs(kind: str) -> None:
    model, x = _model(kind, checkpoint=(4, 3)), _x(kind)
    wanted = _gradients(model, x, (4, 3))
    model.requires_grad_(False)
    torch.testing.assert_close(_gradients_of_x(model, x), wanted[1], rtol=1e-12, atol=1e-14)
    model.hidden_bias.requires_grad_(True)
    model(x.detach()).mul(torch.linspace(0.5, 1.5, 5, dtype=x.dtype)[:, None]).sum().backward()
    torch.testing.assert_close(model.hidden_bias.grad, wanted[5], rtol=1e-12, atol=1e-14)
    assert model.hidden_weight.grad is None
    with torch.no_grad():
        assert not model(x).requires_grad


def _gradients_of_x(model: Any, x: Tensor) -> Tensor:
    out = model(x)
    weight = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weight).sum(), x)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_each_keep_few(kind: str) -> None:
    one = _model(kind)
    several = _model(kind, chunks=3, checkpoint=(3, 2))
    several.load_layers(one.layers())
    x = _x(kind)
    wanted = torch.autograd.grad(one(x).sum(), [x, one.hidden_weight])
    got = torch.autograd.grad(several(x).sum(), [x, *several.hidden_weight])
    torch.testing.assert_close(got[0], wanted[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.cat(got[1:]), wanted[1], rtol=1e-9, atol=1e-11 * wanted[1].abs().max().item())


def test_a_changed_parameter_is_an_error() -> None:
    model, x = _model("cnn", checkpoint=(4, 3)), _x("cnn")
    loss = model(x).sum()
    with torch.no_grad():
        model.hidden_weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_transforms_keep_every_boundary() -> None:
    model, x = _model("cnn", checkpoint=(4, 3)), _x("cnn").detach()
    params: dict[str, Tensor] = dict(model.named_parameters())

    def loss(values: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).sum()

    grads = torch.func.grad(loss)(params)
    model(x).sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(grads[name], p.grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["offset", "plain"])
def test_a_backward_is_linear_in_its_gradient_and_takes_several_at_once(kind: str, form: Any) -> None:
    torch.manual_seed(2)
    model, x = _model(kind, depth=12, form=form, checkpoint=(2, 2)), _x(kind)
    direction = torch.randn_like(x)

    def results(network: Any) -> list[Tensor]:
        out = network(x)
        grad_out = torch.linspace(0.5, 1.5, out.numel(), dtype=out.dtype).view_as(out).requires_grad_()
        linear = torch.autograd.grad(out, x, grad_out, create_graph=True)[0]
        several = torch.stack([grad_out.detach(), torch.ones_like(out)])
        batched = torch.autograd.grad(out, x, several, retain_graph=True, is_grads_batched=True)[0]
        tangent = direction.clone().requires_grad_()
        jvp = torch.autograd.functional.jvp(network, x.detach(), tangent, create_graph=True)[1]
        return [
            linear.detach(),
            *torch.autograd.grad((linear * direction).sum(), grad_out),
            batched,
            jvp.detach(),
            *torch.autograd.grad(jvp.square().sum(), tangent),
            torch.autograd.functional.jacobian(network, x.detach(), vectorize=True),
        ]

    for value, truth in zip(results(model), results(model.to_sequential()), strict=True):
        assert truth.abs().max() > 0
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("chain", [mlp_chain, conv_chain])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"snapshots": 0}, ValueError, "snapshots must be at least 1, got 0"),
        ({"snapshots": 2.0}, TypeError, "snapshots must be an int or None, got 2.0"),
        ({"snapshots": 2**63}, ValueError, "snapshots must be below 2\\*\\*63, got 9223372036854775808"),
        ({"snapshots": True}, TypeError, "snapshots must be an int or None, got True"),
        ({"snapshots": 2, "segment": 0}, ValueError, "segment must be at least 1 where snapshots are given, got 0"),
    ],
)
def test_nonsense_is_refused(chain: Any, arguments: dict, error: type[Exception], message: str) -> None:
    kind = "mlp" if chain is mlp_chain else "cnn"
    model = _model(kind)
    with pytest.raises(error, match=message):
        chain(_x(kind), *model.arguments(), scale=5.0, **arguments)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ((4,), ValueError, r"checkpoint must be a pair \(segment, snapshots\), got \(4,\)"),
        ((0, 3), ValueError, r"checkpoint\[0\] must be at least 1, got 0"),
        ((4, 0), ValueError, r"checkpoint\[1\] must be at least 1, got 0"),
        ((4, "3"), TypeError, r"checkpoint\[1\] must be an int, got '3'"),
    ],
)
def test_nonsense_pairs_are_refused(value: Any, error: type[Exception], message: str) -> None:
    model = _model("mlp")
    with pytest.raises(error, match=message):
        model.checkpoint = value
    assert model.checkpoint == "auto"


def test_a_budget_decides_what_is_kept_and_changes_nothing_else() -> None:
    free = _model("cnn", depth=200)
    x = torch.rand(64, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    given: dict[str, Any] = {"batch_size": 64, "input_shape": (2, 8, 8)}
    least = []
    for schedules in (True, False):
        with pytest.raises(BudgetError) as caught:
            plan(free, **given, budget=1, schedules=schedules)
        least.append(caught.value.smallest)
    wanted = _gradients(free, x, "auto")
    plans = []
    for budget in (least[0], least[1] - 1, f"{1.3 * least[1] / 1e6:.3f}MB", 100 * least[1]):
        model = _model("cnn", depth=200, budget=budget)
        model.load_state_dict(free.state_dict())
        planned = plan(model, **given, budget=budget)
        assert model._checkpointing(x, 3) == (planned.segment, planned.snapshots if planned.schedule else None)
        plans.append(planned)
        for a, b in zip(_gradients(model, x, "auto"), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8 * b.abs().max().item())
    assert [p.schedule is not None for p in plans] == [True, True, False, False]
    assert plans[0].snapshots == 1
    slow_downs = [p.slow_down for p in plans]
    assert slow_downs == sorted(slow_downs, reverse=True)


def test_without_schedules_the_least_budget_needs_the_longest_segments() -> None:
    given: dict[str, Any] = {"model": _model("cnn", depth=2000), "batch_size": 64, "input_shape": (2, 8, 8)}
    with pytest.raises(BudgetError) as caught:
        plan(**given, budget=1, schedules=False)
    least = caught.value.smallest
    plans = [plan(**given, budget=int(factor * least), schedules=False) for factor in (1.0, 1.3, 100.0)]
    assert all(p.schedule is None for p in plans)
    segments = [p.segment for p in plans]
    assert segments == sorted(segments, reverse=True)
    assert segments[0] > segments[-1]


def test_where_no_schedule_runs_a_budget_plans_for_none() -> None:
    """A transform keeps every boundary: what fits with a schedule alone is refused there."""
    model = _model("mlp", depth=400)
    x = torch.rand(256, 3, dtype=torch.float64)
    with pytest.raises(BudgetError) as caught:
        plan(model, batch_size=256, budget=1, schedules=False)
    model.budget = caught.value.smallest - 1
    assert model._checkpointing(x, 1)[1] is not None
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, params, (x,)).sum()

    with pytest.raises(BudgetError):
        torch.func.grad(loss)(params)
    model.budget = caught.value.smallest
    torch.func.grad(loss)(params)


def test_a_budget_that_cannot_be_met_is_an_error_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("mlp", budget="1kB")
    monkeypatch.setattr("narrowdeep.modules.mlp.mlp_chain", None)  # calling it would be another error
    with pytest.raises(BudgetError, match="budget must be at least"):
        model(_x("mlp"))
    model.budget = None
    monkeypatch.undo()
    assert model(_x("mlp")).shape == (5, 1)


def test_budgets_are_checked_when_given() -> None:
    with pytest.raises(ValueError, match="budget must be a number and one of the units"):
        DeepNarrowMLP(2, 1, 10, budget="much")
    with pytest.raises(ValueError, match="budget needs checkpoint='auto', got checkpoint='none'"):
        DeepNarrowMLP(2, 1, 10, budget="1GB", checkpoint="none")


def test_a_budget_asks_nothing_of_a_forward_alone() -> None:
    model = _model("mlp", budget=1)
    with torch.no_grad():
        assert model(_x("mlp")).shape == (5, 1)
