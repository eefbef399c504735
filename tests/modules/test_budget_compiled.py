"""``torch.compile`` of a model with a budget: the plan is made outside the graph."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import Unsupported

from narrowdeep import DeepNarrowMLP


@pytest.fixture(autouse=True)
def _reset() -> None:
    torch._dynamo.reset()


def test_the_graph_breaks_and_the_result_is_the_same() -> None:
    model = DeepNarrowMLP(2, 1, 20, budget="1GiB")
    x = torch.rand(5, 2)
    assert torch.equal(torch.compile(model, backend="eager")(x), model(x))


def test_a_full_graph_is_refused() -> None:
    model = DeepNarrowMLP(2, 1, 20, budget="1GiB")
    with pytest.raises(Unsupported, match="disable"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.rand(5, 2))
