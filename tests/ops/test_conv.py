"""What only the convolution ops do; tests/ops/test_chain.py has what both families do."""

from __future__ import annotations

import pytest
import torch

from narrowdeep import DeepNarrowCNN
from tests.ops.chains import CONV, Case, arguments, assert_close


def test_an_infinite_sample_in_the_last_tile_leaves_no_trace_in_the_lanes_without_samples() -> None:
    args = arguments(Case(1, 1, 6, 1, 1, (1, 1)), torch.float32, False)
    args[0][0] = float("inf")
    args = (args[0], *(p.abs() for p in args[1:]))
    _, saved = CONV.ops.forward(*args, 1.0, False, 4)
    got = CONV.ops.backward(torch.ones(1, 1), *args, saved, 1.0, False, 4, False, True)
    want = CONV.reference.backward(torch.ones(1, 1), *args, saved, 1.0, False, 4, False, True)
    for a, b in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(a, b)
        assert not a.isnan().any()


@pytest.mark.parametrize("size", [1, 3])
def test_what_overflows_past_an_image_leaves_no_trace_in_gradients(size: int) -> None:
    """Every state in the image is 0; the strip past its last row has no zero input, and grows by 1e6 a layer."""
    model = DeepNarrowCNN(1, 1, 12, kernel_size=size, form="plain")
    middle = size // 2
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
        model.first_weight[:, :, middle, middle] = 1.0
        model.hidden_bias[0] = 1.0
        model.hidden_weight[0, :, :, middle, middle] = -torch.eye(3)
        model.hidden_weight[1:, :, :, middle, middle] = 1e6 * torch.eye(3)
        model.last_weight.fill_(1.0)
    eager = model.to_sequential()
    for network in (model, eager):
        network(torch.ones(1, 1, 3, 4)).sum().backward()
    grads = [part.weight.grad for part in eager if isinstance(part, torch.nn.Conv2d) and part.weight.grad is not None]
    torch.testing.assert_close(model.hidden_weight.grad, torch.stack(grads[1:-1]))
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())


def test_the_engine_checks_filters_and_images() -> None:
    args = list(arguments(Case(1, 1, 4, 2, 3, (4, 4)), torch.float32, True))
    even = [args[0], *(w[..., :2, :2] if w.dim() >= 4 else w for w in args[1:])]
    with pytest.raises(RuntimeError, match="odd size, got 2"):
        CONV.ops.forward(*even, 1.0, True, 4)
    with pytest.raises(RuntimeError, match="hidden_weight must have size 3 in dimension 4, got 2"):
        CONV.ops.forward(*args[:3], args[3][..., :2], *args[4:], 1.0, True, 4)
    with pytest.raises(RuntimeError, match="at least 1x1 pixels, got 4x0"):
        CONV.ops.forward(args[0][..., :0], *args[1:], 1.0, True, 4)


@pytest.mark.parametrize("offset", [True, False], ids=["offset", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("segment", [1, 8])
@pytest.mark.parametrize(
    ("size", "image"),
    [(3, (7, 7)), (3, (16, 5)), (5, (9, 6)), (7, (13, 3)), (1, (3, 4)), (3, (1, 8)), (7, (7, 2)), (9, (3, 4))],
)
def test_a_sample_gives_the_same_whoever_is_with_it(
    size: int, image: tuple[int, int], segment: int, dtype: torch.dtype, offset: bool
) -> None:
    """Few images are cut in strips, a lane each, shorter than filters may see; many have a lane each: the outputs agree
    to the bit."""
    x, *params = arguments(Case(2, 1, 37, 70, size, image), dtype, offset)
    together, saved = CONV.ops.forward(x, *params, 3.0, offset, segment)
    grad_out, threads = torch.randn(70, 1, dtype=dtype), torch.get_num_threads()
    grads = CONV.ops.backward(grad_out, x, *params, saved, 3.0, offset, segment, True, True)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            sums = [torch.zeros_like(p, dtype=torch.float64) for p in params]
            begin = 0
            for batch in (1, 2, 3, 4, 5, 8, 12, 35):
                part = slice(begin, begin + batch)
                begin += batch
                out, states = CONV.ops.forward(x[part], *params, 3.0, offset, segment)
                assert torch.equal(out, together[part])
                got = CONV.ops.backward(grad_out[part], x[part], *params, states, 3.0, offset, segment, True, True)
                assert torch.equal(states, saved[..., part])
                assert torch.equal(got[0], grads[0][part])
                for total, g in zip(sums, got[1:], strict=True):
                    total += g.double()
            for total, g in zip(sums, grads[1:], strict=True):
                assert_close(g, total, 1e-5 if dtype == torch.float32 else 1e-13)
    finally:
        torch.set_num_threads(threads)
