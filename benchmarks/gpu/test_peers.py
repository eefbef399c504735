"""Forward, and forward with backward, beside eager PyTorch, a CUDA graph of it, and torch.compile. Needs a CUDA device.

``pytest benchmarks/gpu/test_peers.py``. Each answer is checked against the float64 chain before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowdeep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEPTHS = {"eager": 10_000, "graph": 10_000, "compile": 400, "narrowdeep": 10_000}
"""torch.compile unrolls the layers: past some hundred it takes minutes to start."""


def network(depth: int) -> narrowdeep.DeepNarrowMLP:
    """Two inputs, one output, width 4; scale 1 keeps plain float32 usable for the peers."""
    torch.manual_seed(0)
    return narrowdeep.DeepNarrowMLP(2, 1, depth, scale=1.0, init="ntk").cuda()


def step(model: nn.Module, x: Tensor, backward: bool) -> Callable[[], Tensor]:
    """One call to time."""

    def run() -> Tensor:
        if not backward:
            with torch.no_grad():
                return model(x)
        model.zero_grad(set_to_none=False)
        out = model(x)
        out.square().sum().backward()
        return out.detach()

    return run


def captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be filling x and the weights
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward_backward"])
@pytest.mark.parametrize("batch", [128, 65_536])
@pytest.mark.parametrize("peer", ["narrowdeep", "narrowdeep_graph", "eager", "graph", "compile"])
def test_mlp(benchmark: Any, peer: str, batch: int, backward: bool) -> None:
    ours = network(DEPTHS[peer.split("_")[0]])
    x = torch.rand(batch, 2, device="cuda")
    model: nn.Module = ours if peer.startswith("narrowdeep") else ours.to_sequential()
    if peer == "compile":
        model = torch.compile(model)  # type: ignore[assignment]
    run = step(model, x, backward)
    if peer.endswith("graph"):
        run = captured(run)
    with torch.no_grad():
        expected = network(DEPTHS[peer.split("_")[0]]).double()(x.double())
    tolerance = 1e-5 if peer.startswith("narrowdeep") else 1e-2  # eager float32 loses the rest (docs/theory.md)
    torch.testing.assert_close(run().double(), expected, rtol=0, atol=tolerance * expected.abs().max().item() + 1e-5)

    def timed() -> None:
        run()
        torch.cuda.synchronize()

    benchmark.pedantic(timed, warmup_rounds=2, rounds=10)
