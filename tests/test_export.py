"""Chains as exported programs: a scan of torch's own ops, ONNX, AOTInductor; and TorchScript, which is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowdeep
from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.export import decompositions

BATCH = torch.export.Dim("batch")
SCAN = torch.ops.higher_order.scan

both_families = pytest.mark.parametrize("kind", ["mlp", "cnn"])


def moved(kind: str, depth: int, **settings: Any) -> tuple[Any, Tensor]:
    """A model away from its initialisation, the further the smaller its scale, and a batch."""
    torch.manual_seed(0)
    settings = {"scale": 3.0, **settings}
    distance = 0.4 / depth**0.5 if settings["scale"] < depth else 0.1 / depth
    model: Any = DeepNarrowMLP(2, 3, depth, **settings) if kind == "mlp" else DeepNarrowCNN(1, 2, depth, **settings)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=distance)
    return model, torch.rand(6, *((2,) if kind == "mlp" else (1, 3, 5)), dtype=settings.get("dtype"))


def exported(model: nn.Module, x: Tensor) -> Any:
    return torch.export.export(model, (x,), dynamic_shapes=({0: BATCH},))


def off(found: Any, expected: Tensor) -> float:
    """The largest difference over the largest entry."""
    found, expected = torch.as_tensor(found).detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


@both_families
@pytest.mark.parametrize("form", ["offset", "plain"])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_chain_is_a_scan_of_torchs_own_ops(kind: str, form: Any, chunks: int) -> None:
    model, x = moved(kind, 80, form=form, chunks=chunks, dtype=torch.float64)
    program = exported(model, x).run_decompositions(decompositions())
    targets = [str(node.target) for node in program.graph.nodes]
    assert not any("narrowdeep" in target for target in targets), targets
    assert len(program.graph.find_nodes(op="call_function", target=SCAN)) == chunks
    assert set(program.state_dict) == {name for name, _ in model.named_parameters()}
    eager = model.to_sequential()
    for batch in (6, 1, 11):
        x = torch.rand(batch, *x.shape[1:], dtype=x.dtype)
        assert off(program.module()(x), eager(x)) < 1e-12


@both_families
def test_it_keeps_what_float32_layers_lose(kind: str) -> None:
    """The words of the offset form, and their exact sums at the numbers of the states: of chunks as of the whole."""
    for chunks in (1, 7):
        model, x = moved(kind, 300, scale=300.0, chunks=chunks)
        program = exported(model, x).run_decompositions(decompositions())
        expected = model.to_sequential(dtype=torch.float64)(x.double())
        assert off(program.module()(x), expected) < 1e-6 < off(model.to_sequential()(x), expected) / 10


def test_two_layers() -> None:
    model, x = moved("mlp", 2)
    program = exported(model, x).run_decompositions(decompositions())
    assert off(program.module()(x), model(x)) < 1e-6


def test_behind_other_modules() -> None:
    model = nn.Sequential(nn.Linear(5, 2), nn.Sigmoid(), DeepNarrowMLP(2, 1, 50), nn.Linear(1, 4)).double()
    x = torch.randn(3, 7, 5, dtype=torch.float64)
    program = exported(model, x).run_decompositions(decompositions())
    x = torch.randn(4, 7, 5, dtype=torch.float64)
    assert off(program.module()(x), model(x)) < 1e-12


# ---- ONNX ----


def nodes(graph: Any, found: list[str]) -> list[str]:
    """Types of all nodes, bodies of loops included."""
    for node in graph.node:
        found.append(node.op_type)
        for attribute in node.attribute:
            nodes(attribute.g, found)
    return found


def session(program: Any, x: Tensor, path: Path) -> Any:
    """onnxruntime on one thread with a program that has been written as ONNX."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    torch.onnx.export(program.run_decompositions(decompositions()), (x,), path, dynamo=True, verbose=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(found: Any, x: Tensor) -> Any:
    return found.run(None, {found.get_inputs()[0].name: x.numpy()})[0]


@pytest.mark.parametrize(("kind", "depth", "chunks"), [("mlp", 1000, 1), ("mlp", 1000, 3), ("cnn", 1000, 2)])
def test_onnxruntime_agrees_with_the_model(kind: str, depth: int, chunks: int, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model, x = moved(kind, depth, chunks=chunks, scale=float(depth))
    found = session(exported(model, x), x, tmp_path / "model.onnx")
    for batch in (6, 1, 30):
        x = torch.rand(batch, *x.shape[1:])
        assert off(run(found, x), model(x)) < 1e-6
    types = nodes(onnx.load(tmp_path / "model.onnx", load_external_data=False).graph, [])
    assert types.count("Scan") == chunks
    assert len(types) < 100 * chunks  # none a layer
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert written < 1.2 * sum(p.nbytes for p in model.parameters()) + 50_000 * chunks


@pytest.mark.parametrize("form", ["offset", "plain"])
def test_onnxruntime_in_float64(form: Any, tmp_path: Path) -> None:
    model, x = moved("mlp", 80, form=form, dtype=torch.float64)
    assert off(run(session(exported(model, x), x, tmp_path / "model.onnx"), x), model.to_sequential()(x)) < 1e-13


# ---- AOTInductor ----

FRESH = """
import sys, torch, narrowdeep.export
run = torch._inductor.aoti_load_package(sys.argv[1])
x, y = torch.load(sys.argv[2])
assert torch.equal(run(x), y)
"""


@pytest.mark.slow  # it compiles C++
def test_aotinductor_here_and_in_a_process_of_its_own(tmp_path: Path) -> None:
    """With the op kept: the bits of the model."""
    model, x = moved("mlp", 300, chunks=2)
    path = torch._inductor.aoti_compile_and_package(exported(model, x), package_path=str(tmp_path / "model.pt2"))
    x = torch.rand(9, 2)
    with torch.no_grad():
        y = model(x)
    assert torch.equal(torch._inductor.aoti_load_package(path)(x), y)
    torch.save((x, y), tmp_path / "xy.pt")
    command = [sys.executable, "-c", FRESH, path, str(tmp_path / "xy.pt")]
    folder = Path(narrowdeep.__file__).parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr


# ---- TorchScript ----


@both_families
@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused(kind: str) -> None:
    model, x = moved(kind, 5)
    for refused in (lambda: torch.jit.script(nn.Sequential(model)), lambda: torch.jit.trace(model, (x,))):
        with pytest.raises(NotImplementedError, match=r"TorchScript .*: torch.export.export\(model, \(x,\)\) does"):
            refused()
