"""--lr auto: what the kernel predicts, and that it comes true."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.data import Task, load_task
from narrowdeep.ntk import empirical_ntk
from narrowdeep.step_size import predict_step_size
from narrowdeep.training import thesis_loss


@pytest.fixture(scope="module")
def digits() -> Task:
    return load_task("digits", pool=2, dtype=torch.float64)


def subset(task: Task, count: int) -> Task:
    return dataclasses.replace(task, x_train=task.x_train[:count], y_train=task.y_train[:count])


def descend(model, task, lr, momentum, steps, batches=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    batches = batches or [slice(None)]
    for batch in itertools.islice(itertools.cycle(batches), steps):
        optimizer.zero_grad()
        thesis_loss(model(task.x_train[batch]), task.y_train[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        return thesis_loss(model(task.x_train), task.y_train).item()


@pytest.mark.parametrize("momentum", [None, 0.0, 0.8])
def test_the_predicted_loss_comes_true(momentum):
    """All samples in every step, the kernel on all of them, one output: only the kernel's drift is left (1 / C_L)."""
    task = load_task("toy", samples=37, dtype=torch.float64)
    model = DeepNarrowMLP(2, 1, 129, scale=1e6, dtype=torch.float64)
    predicted = predict_step_size(model, task, steps=60, batch_size=37, momentum=momentum)
    assert predicted.samples == 37
    loss = descend(model, task, predicted.lr, predicted.momentum, 60)
    assert loss == pytest.approx(predicted.loss, rel=1e-3)
    assert loss < 0.5 * task.y_train.square().mean().item() / 2


def test_the_cnn_too(digits):
    task = subset(digits, 17)
    task = dataclasses.replace(task, x_train=task.x_train.unflatten(1, (1, 4, 4)), y_train=task.y_train[:, :1])
    model = DeepNarrowCNN(1, 1, 30, scale=1e6, dtype=torch.float64)
    predicted = predict_step_size(model, task, steps=40, batch_size=17)
    assert descend(model, task, predicted.lr, predicted.momentum, 40) == pytest.approx(predicted.loss, rel=1e-3)


def test_step_and_momentum_by_hand():
    """Two samples, kernel worked out with autograd: tau = N / lambda_max, momentum from the reach of 12 steps."""
    task = load_task("toy", samples=2, dtype=torch.float64)
    model = DeepNarrowMLP(2, 1, 5, dtype=torch.float64)
    rows = []
    for x in task.x_train:
        gradients = torch.autograd.grad(model(x), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in gradients]) * model.ntk_lr**0.5)
    (a, b), (_, d) = (torch.stack(rows) @ torch.stack(rows).T).tolist()
    largest = ((a + d) + ((a - d) ** 2 + 4 * b * b) ** 0.5) / 2 / 2  # over N = 2
    predicted = predict_step_size(model, task, steps=12, batch_size=2)
    assert predicted.largest == pytest.approx(largest, rel=1e-10)
    assert predicted.tau == pytest.approx(1 / largest, rel=1e-10)
    assert predicted.lr == pytest.approx(1 / largest / (5 * 5**2), rel=1e-10)
    assert predicted.momentum == pytest.approx(((3 - 1) / (3 + 1)) ** 2)  # r = 12 / 4


def test_small_batches_shorten_the_step(digits):
    model = DeepNarrowMLP(16, 10, 20, rho=8.0, dtype=torch.float64)
    steps = {b: predict_step_size(model, digits, steps=2000, batch_size=b) for b in (1, 4, 1437, 10**6)}
    diagonal = empirical_ntk(model, digits.x_train, reduce="trace").diagonal().mean().item() / 10
    for batch in (1, 4):
        bound = (1 - steps[batch].momentum) * batch / diagonal
        assert steps[batch].tau == pytest.approx(bound, rel=0.05)  # 128 samples stand for all
    assert steps[1437].tau == steps[10**6].tau == pytest.approx(1 / steps[1437].largest)


@pytest.mark.parametrize("batch", [3, 17])
def test_descent_on_batches_is_stable(digits, batch):
    model = DeepNarrowMLP(16, 10, 20, scale=1e4, rho=8.0, dtype=torch.float64)
    predicted = predict_step_size(model, digits, steps=600, batch_size=batch)
    batches = list(torch.randperm(1437, generator=torch.Generator().manual_seed(1)).split(batch))
    before = digits.y_train.square().sum().item() / 2 / 1437
    loss = descend(model, digits, predicted.lr, predicted.momentum, 600, batches)
    assert loss < 0.95 * before
    # The noise may take back half of the gain: from twice the step on it takes more than all of it.
    model.reset_parameters(torch.Generator().manual_seed(0))
    assert not descend(model, digits, 8 * predicted.lr, predicted.momentum, 600, batches) < before


def test_same_seed_same_prediction(digits):
    model = DeepNarrowMLP(16, 10, 10, dtype=torch.float64)
    first, again, other = (
        predict_step_size(model, digits, steps=9, batch_size=50, samples=20, seed=s) for s in (1, 1, 2)
    )
    assert first == again
    assert first.samples == 20
    assert first.largest != other.largest


def test_one_step_has_no_momentum(digits):
    model = DeepNarrowMLP(16, 10, 10, dtype=torch.float64)
    assert predict_step_size(model, digits, steps=1, batch_size=50).momentum == 0


def test_needs_the_thesis_initialisation(digits):
    model = DeepNarrowMLP(16, 10, 10, init="kaiming", form="plain", dtype=torch.float64)
    with pytest.raises(ValueError, match="init must be 'ntk'.*got 'kaiming'"):
        predict_step_size(model, digits, steps=9, batch_size=50)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"steps": 0}, ValueError, r"steps must be at least 1, got 0"),
        ({"steps": 10**400}, ValueError, r"steps must be below 2\*\*63, got an int of 1329 bits"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an int, got 2.5"),
        ({"samples": "12"}, TypeError, "samples must be an int, got '12'"),
        ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
        ({"momentum": float("nan")}, ValueError, "momentum must be at least 0 and below 1, got nan"),
    ],
)
def test_bad_arguments(digits, arguments, error, message):
    model = DeepNarrowMLP(16, 10, 10, dtype=torch.float64)
    with pytest.raises(error, match=message):
        predict_step_size(model, digits, **{"steps": 9, "batch_size": 50, **arguments})
