"""What only the convolution ops do; tests/ops/test_chain.py has what both families do."""

from __future__ import annotations

import pytest
import torch

from tests.ops.chains import CONV, Case, arguments


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


def test_the_engine_checks_filters_and_images() -> None:
    args = list(arguments(Case(1, 1, 4, 2, 3, (4, 4)), torch.float32, True))
    even = [args[0], *(w[..., :2, :2] if w.dim() >= 4 else w for w in args[1:])]
    with pytest.raises(RuntimeError, match="odd size, got 2"):
        CONV.ops.forward(*even, 1.0, True, 4)
    with pytest.raises(RuntimeError, match="hidden_weight must have size 3 in dimension 4, got 2"):
        CONV.ops.forward(*args[:3], args[3][..., :2], *args[4:], 1.0, True, 4)
    with pytest.raises(RuntimeError, match="at least 1x1 pixels, got 4x0"):
        CONV.ops.forward(args[0][..., :0], *args[1:], 1.0, True, 4)
