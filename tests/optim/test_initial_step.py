"""The first step of a network at its initialisation, which runs no backward, against one that does."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.ntk.features import InitialFeatures
from narrowdeep.optim import GramGaussNewton
from narrowdeep.optim.gauss_newton import GaussNewtonStep
from narrowdeep.optim.initial_step import InitialStep

Narrow = DeepNarrowMLP | DeepNarrowCNN


def task(kind: str, dtype: torch.dtype = torch.float64, samples: int = 7, **settings: Any) -> tuple[Narrow, Tensor]:
    torch.manual_seed(3)
    if kind == "mlp":
        return DeepNarrowMLP(3, 2, 14, dtype=dtype, scale=40.0, **settings), torch.randn(samples, 3, dtype=dtype)
    model = DeepNarrowCNN(2, 2, 9, kernel_size=5 if kind == "cnn5" else 3, dtype=dtype, scale=40.0, **settings)
    return model, torch.randn(samples, 2, 3, 4, dtype=dtype)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def by_backward(model: nn.Module, x: Tensor, coefficients: Tensor) -> Tensor:
    model(x).backward(coefficients)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def refuse_backwards(model: Narrow, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise AssertionError("a backward ran")

    monkeypatch.setattr(GramGaussNewton, "_backward", refuse)
    monkeypatch.setattr("narrowdeep.optim.gauss_newton.ChunkwisePass", refuse)


FROZEN: dict[str, tuple[str, ...]] = {
    "nothing": (),
    "the ends": ("first_weight", "first_bias", "last_weight", "last_bias"),
    "weights": ("first_weight", "hidden_weight", "last_weight"),
    "biases": ("first_bias", "hidden_bias", "last_bias"),
    "a chunk": ("hidden_weight.1", "hidden_bias.0", "last_bias"),
}


@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("kind", ["mlp", "cnn", "cnn5"])
def test_parameters_move_by_the_gradient_of_a_backward(
    kind: str, form: Any, frozen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = task(kind, form=form, chunks=3)
    for name, param in model.named_parameters():
        param.requires_grad_(not any(name == given or name.startswith(f"{given}.") for given in FROZEN[frozen]))
    before, kept = flat(model), copy.deepcopy(model)
    optimizer = GramGaussNewton(model, kernel="features", damping=1e-2)
    found: list[Tensor] = []
    gradients = InitialFeatures.output_gradients

    def kept_coefficients(self: InitialFeatures, samples: Tensor, v: Tensor, advance: Any) -> Any:
        found.append(v)
        return gradients(self, samples, v, advance)

    monkeypatch.setattr(InitialFeatures, "output_gradients", kept_coefficients)
    module = sys.modules["narrowdeep.ntk.features"]  # the package has a function of that name
    monkeypatch.setattr(module, "_PATCH_BYTES", 3 * 8 * 9 * x[0].numel())  # a few samples a block
    refuse_backwards(model, monkeypatch)
    y = torch.randn(7, 2, dtype=x.dtype)
    step = optimizer.step(x, y)
    assert step.accepted
    assert step.loss == pytest.approx(float(y.square().sum()) / 14, rel=1e-14)
    expected = kept.ntk_lr * by_backward(kept, x, found[0])
    torch.testing.assert_close(flat(model) - before, expected, rtol=1e-12, atol=1e-13 * float(before.abs().max()))


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_step_that_is_taken_back_leaves_every_bit(
    kind: str, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = task(kind, torch.float32, form="plain", chunks=chunks)
    kept = copy.deepcopy(model.state_dict())
    optimizer = GramGaussNewton(model, kernel="features", damping=1e-2)
    y = torch.randn(7, 2)
    outputs = GramGaussNewton._outputs
    monkeypatch.setattr(GramGaussNewton, "_outputs", lambda *args: outputs(*args) + 100.0)
    refuse_backwards(model, monkeypatch)
    with pytest.warns(UserWarning, match="moved too far"):
        step = optimizer.step(x, y)
    assert not step.accepted
    for name, value in model.named_parameters():
        assert torch.equal(value, kept[name]), name
    monkeypatch.setattr(GramGaussNewton, "_outputs", outputs)
    assert optimizer.step(x, y).accepted  # and it is at its initialisation again


def changed(model: Narrow) -> None:
    with torch.no_grad():
        model.in_chunks("hidden_weight")[0][0, 0, 0] += 0.1


def drawn_again(model: Narrow) -> None:
    model.reset_parameters()


def hooked(model: Narrow) -> None:
    model.last_weight.register_hook(lambda grad: 0.5 * grad)


def hooked_module(model: Narrow) -> None:
    model.register_forward_hook(lambda *args: args[2] + 1)


def replaced(model: Narrow) -> None:
    forward = model.forward
    model.forward = lambda x: forward(x) + 1  # type: ignore[method-assign]


def frozen_later(model: Narrow) -> None:
    model.last_weight.requires_grad_(False)


@pytest.mark.filterwarnings("ignore:the step has taken the loss")  # by a kernel of other weights
@pytest.mark.parametrize("change", [changed, drawn_again, hooked, hooked_module, replaced, frozen_later])
def test_any_other_network_takes_a_backward(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = task("mlp")
    optimizer = GramGaussNewton(model, kernel="features", damping=1e-2)
    change(model)
    y = torch.randn(7, 2, dtype=x.dtype)
    before = float((y - model(x).detach()).square().sum()) / 14
    calls: list[int] = []
    backward = GramGaussNewton._backward

    def counted(*args: Any) -> None:
        calls.append(1)
        backward(*args)

    monkeypatch.setattr(GramGaussNewton, "_backward", counted)
    assert optimizer.step(x, y).loss == pytest.approx(before, rel=1e-12)
    assert calls == [1]


def test_a_step_that_cannot_be_taken_back_keeps_no_copy() -> None:
    model, x = task("mlp", chunks=3)
    optimizer = GramGaussNewton(model, kernel="features", damping=1e-2, adaptive=False)
    made: list[InitialStep] = []
    of = optimizer._initial_step
    optimizer._initial_step = lambda *args: made.append(of(*args)) or made[0]  # type: ignore
    optimizer.step(x, torch.randn(7, 2, dtype=x.dtype))
    assert made[0]._before == ()


def test_the_network_runs_once_and_only_to_measure() -> None:
    """Behind a module, in batches, with the prediction for others, and the loss of a closure."""
    model, x = task("mlp", torch.float32, samples=10)
    inputs, labels = x.repeat_interleave(2, -1), torch.arange(10) % 2
    steps: list[GaussNewtonStep] = []
    for by_backward in (False, True):
        squares = GramGaussNewton(
            nn.Sequential(nn.AvgPool1d(2), copy.deepcopy(model)), kernel="features", damping=1e-2, batch_size=4
        )
        entropy = GramGaussNewton(copy.deepcopy(model), kernel="features", damping=1e-2)
        if by_backward:
            squares._initial_step = entropy._initial_step = lambda *_: None  # type: ignore[method-assign]
        progress: list[tuple[int, int]] = []
        steps.append(
            squares.step(
                inputs,
                nn.functional.one_hot(labels, 2).float(),
                at=inputs[:3],
                on_batch=lambda *done, seen=progress: seen.append(done),
            )
        )
        assert progress[-3:] == ([(34, 40), (38, 40), (40, 40)] if by_backward else [(24, 30), (28, 30), (30, 30)])

        def loss(net: nn.Module = entropy.model) -> Tensor:
            return nn.functional.cross_entropy(net(x), labels)

        steps.append(entropy.step(loss))
    for one, other in zip(steps[:2], steps[2:], strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)
        assert one.measured == pytest.approx(other.measured, rel=1e-4)
        torch.testing.assert_close(one.fitted, other.fitted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
def test_samples_whose_outputs_are_not_finite_are_refused(bad: float, adaptive: bool) -> None:
    model, x = task("mlp", torch.float32)
    kept = flat(model)
    x[3, 1] = bad
    with pytest.raises(ValueError, match="model must have finite outputs at x, got NaN or infinity"):
        GramGaussNewton(model, kernel="features", adaptive=adaptive).step(x, torch.randn(7, 2))
    assert torch.equal(flat(model), kept)


def test_one_of_the_others_that_is_not_finite_has_no_prediction() -> None:
    model, x = task("mlp")
    others = x[:3].clone()
    others[1, 0] = float("nan")
    step = GramGaussNewton(model, kernel="features", damping=1e-2).step(x, torch.randn(7, 2).double(), at=others)
    assert step.outputs is not None
    assert step.outputs.isfinite().all(1).tolist() == [True, False, True]


def test_a_step_too_large_for_the_parameters_is_refused() -> None:
    model, x = task("mlp")
    kept = flat(model)
    optimizer = GramGaussNewton(model, kernel="features", damping=1e-2)
    optimizer._params.rate = 1e308 * 10
    with pytest.raises(RuntimeError, match="the step is not finite: the model is as it was"):
        optimizer.step(x, torch.randn(7, 2, dtype=x.dtype))
    assert torch.equal(flat(model), kept)
