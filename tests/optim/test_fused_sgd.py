"""FusedSGD against torch.optim.SGD, and what it promises about gradients that exist at one time."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from narrowdeep import DeepNarrowMLP
from narrowdeep.optim import FusedSGD
from tests.distributed.ranks import run


def _eager(depth: int = 6) -> nn.Sequential:
    return nn.Sequential(*(m for _ in range(depth) for m in (nn.Linear(5, 5), nn.Tanh())))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, gamma: float = 1.0) -> None:
    """A loop that knows nothing of fused steps."""
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        parameter = next(model.parameters())
        x = torch.randn(7, parameter.shape[1], generator=generator, dtype=parameter.dtype)
        optimizer.zero_grad()
        (model(x) ** 2).mean().backward()
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("family", ["eager", "chain"])
def test_identical_to_torch_sgd(family: str, momentum: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = _eager().to(dtype) if family == "eager" else DeepNarrowMLP(2, 2, 17, scale=3.0, dtype=dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    _train(model, FusedSGD(model, 0.01, momentum), 5, gamma=0.8)
    _train(twin, torch.optim.SGD(twin.parameters(), 0.01, momentum, foreach=False), 5, gamma=0.8)
    for p, q, s in zip(model.parameters(), twin.parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q)
        assert not torch.equal(p, s)


def test_known_values() -> None:
    """p = 1 with loss p: gradient 1 each time; lr 1/2, momentum 1/2 give p = 1, 1/2, -1/4, -9/8."""
    p = nn.Parameter(torch.ones(()))
    optimizer = FusedSGD([p], 0.5, 0.5)
    for expected in (0.5, -0.25, -1.125):
        (1.0 * p).backward()
        assert p.item() == expected
        assert p.grad is None
    assert optimizer.state[p]["momentum_buffer"].item() == 1.75


def test_gradients_of_all_layers_never_exist_at_once() -> None:
    model = _eager(20)
    alive: list[int] = []
    for p in model.parameters():  # registered first, so it counts before the step frees
        p.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(q.grad is not None for q in model.parameters()))
        )
    optimizer = FusedSGD(model, 0.1)
    model(torch.randn(3, 5)).sum().backward()
    assert len(alive) == 40
    assert max(alive) <= 2
    alive.clear()
    optimizer.remove()
    model(torch.randn(3, 5)).sum().backward()
    assert max(alive) == 40


def test_groups_keep_their_own_settings_through_a_state_dict() -> None:
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))
    groups: list[dict[str, Any]] = [{"params": [a]}, {"params": [b], "lr": 10.0, "momentum": 0.5}]
    optimizer = FusedSGD(groups, 1.0)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = 2.0
    for _ in range(2):
        (a.sum() + b.sum()).backward()
    assert torch.equal(a.detach(), torch.full((3,), -4.0))
    assert torch.equal(b.detach(), torch.full((2,), -25.0))


def test_resuming_from_a_state_dict_changes_nothing() -> None:
    torch.manual_seed(0)
    straight = _eager()
    halves = copy.deepcopy(straight)
    optimizer = FusedSGD(straight, 0.05, 0.9)
    _train(straight, optimizer, 3)
    _train(straight, optimizer, 2)
    optimizer = FusedSGD(halves, 0.05, 0.9)
    _train(halves, optimizer, 3)
    saved = optimizer.state_dict()
    optimizer.remove()
    resumed = FusedSGD(halves, 1.0)
    resumed.load_state_dict(saved)
    _train(halves, resumed, 2)
    for p, q in zip(halves.parameters(), straight.parameters(), strict=True):
        assert torch.equal(p, q)


def test_step_runs_a_closure_once() -> None:
    p = nn.Parameter(torch.ones(()))
    optimizer = FusedSGD([p], 0.25)

    def closure() -> torch.Tensor:
        loss = 2.0 * p
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert p.item() == 0.5
    assert optimizer.step() is None


def test_autograd_grad_does_not_step() -> None:
    p = nn.Parameter(torch.ones(()))
    optimizer = FusedSGD([p], 1.0)
    (gradient,) = torch.autograd.grad(3.0 * p, p)
    assert (gradient.item(), p.item(), len(optimizer.state)) == (3.0, 1.0, 0)


def test_frozen_parameters_stay() -> None:
    model = _eager(2)
    frozen = next(model.parameters()).requires_grad_(False)
    before = frozen.clone()
    optimizer = FusedSGD(model, 0.1)
    model(torch.randn(3, 5)).sum().backward()
    assert torch.equal(frozen, before)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 3


def test_a_parameter_steps_once() -> None:
    model = _eager(1)
    optimizer = FusedSGD(model, 0.1)
    with pytest.raises(
        ValueError, match=r"params must not belong to another FusedSGD, got a parameter of shape \(5, 5\)"
    ):
        FusedSGD(model, 0.1)
    optimizer.remove()
    second = FusedSGD(model, 0.1)
    del second  # and an optimizer that is gone lets go by itself
    third = FusedSGD(model, 0.1)
    third.remove()
    model(torch.randn(3, 5)).sum().backward()
    assert model[0].weight.grad is not None


def test_optimizer_and_parameters_are_freed() -> None:
    model = _eager(1)
    optimizer = FusedSGD(model, 0.1, 0.9)
    model(torch.randn(3, 5)).sum().backward()
    references: list[weakref.ref] = [weakref.ref(model), weakref.ref(model[0].weight), weakref.ref(optimizer)]
    del model, optimizer
    gc.collect()
    assert [r() for r in references] == [None, None, None]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
        ({"lr": float("nan")}, ValueError, "lr must be finite and not negative, got nan"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
        ({"lr": 0.1, "momentum": -0.5}, ValueError, "momentum must be finite and not negative, got -0.5"),
        ({"lr": 10**400}, ValueError, r"lr must be finite and not negative, got an int of 1329 bits"),
        ({"lr": 0.1, "momentum": True}, TypeError, "momentum must be a number, got True"),
    ],
)
def test_bad_settings(settings: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FusedSGD(_eager(1), **settings)


def test_cannot_be_copied() -> None:
    with pytest.raises(TypeError, match="use state_dict"):
        copy.deepcopy(FusedSGD(_eager(1), 0.1))


@pytest.mark.parametrize("how", ["torch", "pickle", "deepcopy"])
def test_a_model_in_training_can_be_saved_and_copied(how: str) -> None:
    """The copy holds the same numbers and belongs to no optimizer."""
    torch.manual_seed(0)
    model = _eager(2)
    optimizer = FusedSGD(model, 0.1)
    if how == "torch":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = pickle.loads(pickle.dumps(model)) if how == "pickle" else copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 5)
    other(x).sum().backward()
    for name, p in other.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is not None
    FusedSGD(other, 0.1).remove()
    model(x).sum().backward()  # the model itself steps as before
    assert not torch.equal(model.get_parameter("0.weight"), before["0.weight"])
    optimizer.remove()


def test_frozen_parameters_in_a_list_are_refused() -> None:
    p, frozen = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(2), requires_grad=False)
    with pytest.raises(ValueError, match=r"params must require gradients, got a parameter of shape \(2,\)"):
        FusedSGD([p, frozen], 0.1)
    FusedSGD([p], 0.1).remove()  # nothing was left behind


def test_numpys_numbers() -> None:
    p = nn.Parameter(torch.ones(()))
    optimizer = FusedSGD([p], np.float32(0.25), np.int64(0))
    (2.0 * p).backward()
    assert p.item() == 0.5
    optimizer.remove()


@pytest.mark.parametrize("shape", [(1,), (5,), (5, 1), (1, 5, 5), (0,)])
def test_a_buffer_of_another_shape_is_refused_before_anything_is_changed(shape: tuple[int, ...]) -> None:
    model = _eager(1)
    optimizer = FusedSGD(model, 0.1, 0.5)
    model(torch.randn(3, 5)).sum().backward()
    state = copy.deepcopy(optimizer.state_dict())
    before = copy.deepcopy(state)
    state["state"][0]["momentum_buffer"] = torch.zeros(shape)
    state["param_groups"][0]["lr"] = 7.0
    with pytest.raises(ValueError, match=r"momentum_buffer 0 must have the shape \(5, 5\) of its parameter, got \("):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(after["state"][i]["momentum_buffer"], before["state"][i]["momentum_buffer"]) for i in (0, 1)
    )


@pytest.mark.parametrize("clip", ["clip_grad_norm_", "clip_grad_value_"])
@pytest.mark.parametrize("module", [nn.utils, nn.utils.clip_grad])
def test_clipping_is_refused_by_name(module: Any, clip: str) -> None:
    """As Lightning and Accelerate call it: looked up in torch when it is used."""
    model = _eager(1)
    optimizer = FusedSGD(model, 0.1)
    model(torch.randn(3, 5)).sum().backward()
    for parameters in (model.parameters(), list(model.parameters()), model[0].bias):
        with pytest.raises(RuntimeError, match=f"{clip} cannot clip parameters that FusedSGD steps"):
            getattr(module, clip)(parameters, 1.0)
    optimizer.remove()
    model[0].weight.grad = torch.full((5, 5), 2.0)
    model[0].bias.grad = torch.zeros(5)
    norm = getattr(module, clip)(model.parameters(), 1.0)  # and other parameters as ever: the norm is 10
    if clip == "clip_grad_norm_":
        assert norm.item() == 10.0
        torch.testing.assert_close(model[0].weight.grad, torch.full((5, 5), 0.2))
    else:
        assert torch.equal(model[0].weight.grad, torch.ones(5, 5))


IMPORTED_BEFORE = """
import torch
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.nn.utils.clip_grad import clip_grad_norm
from narrowdeep.optim import FusedSGD

model = torch.nn.Linear(2, 1)
optimizer = FusedSGD(model, 0.1)
for clip in (clip_grad_norm_, clip_grad_norm, clip_grad_value_):
    model(torch.ones(3, 2)).sum().backward()
    try:
        clip(model.parameters(), 0.5)
    except RuntimeError as error:
        print(error)
"""


def test_clipping_is_refused_where_it_was_imported_before() -> None:
    done = subprocess.run([sys.executable, "-c", IMPORTED_BEFORE], capture_output=True, text=True, timeout=120)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr  # torch itself refuses to clip no values, in other words
    assert all("cannot clip parameters that FusedSGD steps inside backward" in line for line in lines[:2])


@pytest.mark.parametrize("family", ["eager", "chain", "itself", "several"])
def test_gradscaler_is_refused_by_name_before_anything_moves(family: str) -> None:
    model = DeepNarrowMLP(5, 2, 17) if family == "chain" else _eager()
    before = copy.deepcopy(model.state_dict())
    optimizer = FusedSGD(model, 0.1)
    loss = model(torch.randn(3, 5)).sum()
    scaler = torch.amp.GradScaler("cpu")
    losses: Any = {"itself": next(model.parameters()), "several": [torch.ones(()), loss]}
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with FusedSGD"):
        scaler.scale(losses.get(family, loss)).backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    other = nn.Parameter(torch.ones(()))  # which no FusedSGD steps
    sgd = torch.optim.SGD([other], 0.25)
    scaler.scale(2.0 * other).backward()
    scaler.step(sgd)
    assert other.item() == 0.5
    optimizer.remove()
    scaler.scale(model(torch.randn(3, 5)).sum()).backward()


@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradscaler_that_was_not_seen_is_refused_at_its_step(unscale: bool) -> None:
    p = nn.Parameter(torch.ones(()))
    optimizer = FusedSGD([p], 0.25)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    (2.0 * p).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler cannot be used with FusedSGD"):
        scaler.step(optimizer)


def test_a_gradscaler_that_does_nothing() -> None:
    p = nn.Parameter(torch.ones(()))
    optimizer = FusedSGD([p], 0.25)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.scale(2.0 * p).backward()
    scaler.step(optimizer)
    scaler.update()
    assert p.item() == 0.5


def _network(chunks: int = 3) -> DeepNarrowMLP:
    model = DeepNarrowMLP(2, 1, 17, scale=20.0, chunks=chunks, dtype=torch.float64)
    model.reset_parameters(torch.Generator().manual_seed(7))
    return model


def _batches(steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.rand(8, 2, dtype=torch.float64, generator=generator) for _ in range(steps)]


def _rank(rank: int, wrap: str) -> Any:
    """20 steps on this rank's half of each batch."""
    model = _network()
    module: Any = model
    if wrap == "before":
        module = nn.parallel.DistributedDataParallel(model)
    optimizer = FusedSGD(model, 0.1 * model.ntk_lr, 0.9)
    if wrap == "after":
        module = nn.parallel.DistributedDataParallel(model)
    for x in _batches(20):
        (module(x[4 * rank : 4 * rank + 4]) - 1).square().mean().backward()
    return model.state_dict(), len(optimizer._pending), [p.grad is None for p in model.parameters()]


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("wrap", ["no", "before", "after"])
def test_several_processes_take_the_steps_of_one(wrap: str) -> None:
    expected = _network()
    optimizer = torch.optim.SGD(expected.parameters(), 0.1 * expected.ntk_lr, 0.9)
    for x in _batches(20):
        (expected(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    results = run(_rank, 2, wrap)
    for state, pending, gone in results:
        assert pending == 0
        assert wrap != "no" or all(gone)
        for name, value in expected.state_dict().items():
            assert torch.equal(state[name], results[0][0][name])
            torch.testing.assert_close(state[name], value, rtol=1e-12, atol=1e-12)
    assert not torch.equal(expected.last_bias, _network().last_bias)


def _apart(rank: int) -> Any:
    """Parameters 1; process r has the gradient r + 1."""
    alone = dist.new_group([0]), dist.new_group([1])
    found: list[Any] = []
    for settings in ({}, {"local": True}, {"process_group": alone[rank]}):
        kept = FusedSGD([own := nn.Parameter(torch.ones(()))], 0.25, **settings)
        ((rank + 1) * own).backward()
        found.append(own.item())
        kept.remove()
    other = nn.Parameter(torch.full((3,), float(rank)))
    optimizer = FusedSGD([other], 0.25)
    try:
        other.sum().backward()
    except RuntimeError as error:
        found.append(str(error))
    return found, other.tolist(), optimizer.local


@pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")
def test_what_several_processes_average() -> None:
    for rank, ((averaged, local, alone, error), other, _) in enumerate(run(_apart, 2)):
        assert averaged == 1 - 0.25 * 1.5
        assert local == alone == 1 - 0.25 * (rank + 1)
        assert error.startswith("FusedSGD needs the same parameters in all 2 processes, got a parameter of shape (3,)")
        assert other == [rank] * 3
