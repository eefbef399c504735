"""Layers between saved states: what a module asks of its op, with and without autograd."""

from __future__ import annotations

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP, memory
from narrowdeep.memory import step


class SavedStates(TorchDispatchMode):
    """Sizes of the states that the forward ops save."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in ("mlp_forward", "cnn_forward"):
            self.sizes.append(result[1].numel())
        return result


def networks(checkpoint):
    return [
        (DeepNarrowMLP(3, 2, 129, checkpoint=checkpoint), torch.rand(5, 3)),
        (DeepNarrowCNN(1, 1, 129, checkpoint=checkpoint), torch.rand(5, 1, 3, 4)),
    ]


@pytest.mark.parametrize("checkpoint", ["auto", "none", 7])
def test_nothing_is_saved_without_autograd(checkpoint):
    for model, x in networks(checkpoint):
        with SavedStates() as saved:
            trained = model(x)
            with torch.no_grad():
                evaluated = model(x)
            with torch.inference_mode():
                inferred = model(x)
        assert saved.sizes[0] > 0
        assert saved.sizes[1:] == [0, 0]
        assert torch.equal(evaluated, trained)
        assert torch.equal(inferred, trained)


def test_transforms_differentiate_without_autograd():
    for model, x in networks("auto"):
        model.double()
        x = x.double()
        (expected,) = torch.autograd.grad(model(x.requires_grad_()).sum(), x)
        with torch.no_grad():
            got = torch.func.grad(lambda x, model=model: model(x).sum())(x)
        assert torch.equal(got, expected)


def test_segment_by_checkpoint():
    assert DeepNarrowMLP(1, 1, 50, checkpoint="none").segment(10**9) == 1
    assert DeepNarrowMLP(1, 1, 50, checkpoint=7).segment(1) == 7
    assert DeepNarrowMLP(1, 1, 50).segment(1) == 64
    assert DeepNarrowMLP(1, 1, 10_000).segment(1) == 100
    assert DeepNarrowMLP(125, 1, 9).segment(1) == 64  # 127 products to compute a number of a state; from 128 on, saved
    wide = DeepNarrowMLP(126, 1, 9)  # 8 states of 128 units
    assert wide.segment(1) == 1
    most = step.AUTO_NUMBERS // (8 * 128)
    assert (wide.segment(most), wide.segment(most + 1)) == (1, 64)
    assert DeepNarrowMLP(1, 1, 50).segment(most) == 64  # however few they are
    assert DeepNarrowCNN(12, 1, 50).segment(1) == 64  # 14 channels, 9 taps: 126 products
    assert DeepNarrowCNN(13, 1, 50).segment(1) == 1
    assert DeepNarrowCNN(13, 1, 50).segment(28 * 28) == 1
    most = step.AUTO_NUMBERS // (49 * 15)  # positions of 15 channels in 49 states
    assert (DeepNarrowCNN(13, 1, 50).segment(most), DeepNarrowCNN(13, 1, 50).segment(most + 1)) == (1, 64)
    deep = DeepNarrowMLP(126, 1, 6000, device="meta")  # twice 128 * 129 parameters in each of 5,998 layers are more
    assert (deep.segment(257), deep.segment(259)) == (1, 77)
    assert DeepNarrowCNN(1, 1, 50).segment(1) == 64
    assert DeepNarrowCNN(1, 1, 10_000).segment(1) == 100


def test_a_plan_is_of_training_wherever_it_is_made():
    model = DeepNarrowMLP(3, 2, 129)
    with torch.no_grad():
        planned = memory.plan(model, batch_size=5)
    assert planned.segment == model.segment(5) > 0


@pytest.mark.parametrize("checkpoint", [1000, 2**60, sys.maxsize])
def test_a_segment_of_more_layers_than_there_are_is_all_of_them(checkpoint):
    for (model, x), (same, _) in zip(networks(checkpoint), networks(129), strict=True):
        same.load_state_dict(model.state_dict())
        gradients = [torch.autograd.grad(m(x).square().sum(), list(m.parameters())) for m in (model, same)]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    params = [p.detach() for p in model.stacked()]
    for segment in (2**62, sys.maxsize):
        span = (model.scale, True, model.out_channels, 0, segment)
        out, saved = torch.ops.narrowdeep.cnn_forward(x, *params, *span)
        torch.ops.narrowdeep.cnn_backward(out, x, *params, saved, *span, True, True)
        torch.testing.assert_close(out, model(x))


def test_from_sequential_leaves_the_random_numbers_alone():
    sequential = DeepNarrowMLP(3, 2, 5).to_sequential()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    DeepNarrowMLP.from_sequential(sequential)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("scale", [1e39, 1e-39, 1e200])
def test_a_scale_that_the_dtype_cannot_hold_is_refused(scale):
    with pytest.raises(ValueError, match="scale must have scale.*within the range of float32"):
        DeepNarrowMLP(3, 1, 4, scale=scale)
