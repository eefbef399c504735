"""Which implementation a CUDA tensor gets, without a device."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from narrowdeep.ops import layered, triton_chain, triton_dispatch
from narrowdeep.ops.cnn import triton as conv
from narrowdeep.ops.mlp import triton as mlp
from narrowdeep.ops.triton_common import Block, choose_block
from tests.gpu.cases import Case, draw_inputs


class Recorder:
    """In place of torch's library: keeps what is registered."""

    def __init__(self) -> None:
        self.implementations: dict[str, Callable[..., Any]] = {}

    def impl(self, name: str, function: Callable[..., Any], key: str) -> None:
        assert key == "CUDA"
        self.implementations[name] = function


def registered(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    recorder: Any = Recorder()
    triton_dispatch.register(recorder, "mlp_forward", "narrowdeep.ops.mlp.triton", otherwise)
    return recorder.implementations["mlp_forward"]


def test_importing_narrowdeep_imports_no_triton_and_starts_no_device() -> None:
    program = (
        "import sys, torch, narrowdeep\nassert 'triton' not in sys.modules\nassert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"x must be torch\.float32 or torch\.float64, got " + str(dtype)):
        registered(lambda *_: None)(torch.zeros(2, 1, dtype=dtype))


def test_without_triton_layers_run_one_at_a_time() -> None:
    with mock.patch.object(triton_dispatch, "missing", return_value="the package triton is not installed"):
        assert registered(lambda x: ("layered", x.shape))(torch.zeros(2, 1)) == ("layered", (2, 1))
        status = triton_dispatch.triton_status()
    assert not status["available"]
    assert status["reason"] == "the package triton is not installed"
    assert status["version"] is None


def test_missing_names_the_package() -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert triton_dispatch.missing.__wrapped__() == "the package triton is not installed"


def test_status_reports_the_limits_of_the_code() -> None:
    status = triton_dispatch.triton_status()
    assert status["dtypes"] == ["float32", "float64"]
    assert f"width <= {mlp.widest('jvp', torch.float64)} in float64" in status["kernels"]["mlp jvp"]
    assert (status["reason"] is None) == status["available"]


def test_status_knows_the_limits_of_an_older_device() -> None:
    with mock.patch("narrowdeep.ops.triton_common.capability", return_value=75):
        assert "width <= 32 in float32" in triton_dispatch.triton_status()["kernels"]["mlp forward"]


def test_groups_keep_to_the_limits_of_a_grid() -> None:
    state = torch.empty(2, 1, device="meta")
    assert triton_chain.layers_a_group(state, 2) == 2 * 65_535


@pytest.mark.parametrize("segment", [1, 2, 3])
@pytest.mark.parametrize("image", [(), (3, 2)])
def test_workspace_is_what_a_backward_allocates(image: tuple[int, ...], segment: int) -> None:
    """Where most is needed: h and g of a group of layers, and a convolution's padded states."""
    case = Case(1, 1, 9, 5, True, torch.float64, segment, image=image)
    inputs: Any = draw_inputs(case)
    x, params = inputs[0], inputs[1:]
    family = conv.FAMILY if image else mlp.FAMILY
    most = 0

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **_: Any) -> None:
        nonlocal most
        tensors = dict(zip(kernel.arg_names, args, strict=False))
        held = [tensors[name] for name in ("h_ptr", "g_ptr") if name in tensors]
        held = [t for t in held if t.untyped_storage().data_ptr() != saved.untyped_storage().data_ptr()]
        padded = [tensors["scratch_ptr"]] if image else []
        if kernel.fn.__name__ in ("chain_recompute", "chain_backward"):
            most = max(most, sum(t.numel() * t.element_size() for t in [*held, *padded]))

    arguments: Any = (*inputs, 10.0, True, segment)
    saved = layered.forward(family.layer, *arguments)[1]
    with mock.patch.multiple(triton_chain, launch=launch, SCRATCH_BYTES=2000):
        walk = triton_chain.Descent(
            family, x, params, saved, 10.0, True, segment, triton_chain.layers_a_group(saved[0, 0], segment)
        )
        list(walk.groups(torch.ones(5, 1, dtype=torch.float64), True))
        assert triton_chain.workspace(family, x, params[2], True, segment) == most


@pytest.mark.parametrize(
    ("samples", "expected"), [(128, 32), (132 * 4 * 128 - 1, 32), (132 * 4 * 128, 512), (10**7, 512)]
)
def test_small_batches_take_small_programs(samples: int, expected: int) -> None:
    chosen: list[Block] = []
    choose_block(("key",), [Block(512, 4), Block(32, 1)], samples, torch.device("cpu"), chosen.append)
    assert [block.samples for block in chosen] == [expected]


@pytest.mark.parametrize("kernel", ["forward", "backward", "jvp"])
def test_what_kernels_take(kernel: str) -> None:
    x, weight = torch.empty(3, 2), torch.empty(1, 5, 5)
    assert mlp.supported(kernel, x, weight)
    assert not mlp.supported(kernel, x[:0], weight)
    assert not mlp.supported(kernel, x, weight[:0])
    widest = mlp.widest(kernel, torch.float32)
    assert mlp.supported(kernel, x, torch.empty(1, widest, widest))
    assert not mlp.supported(kernel, x, torch.empty(1, widest + 1, widest + 1))
    image = torch.empty(2, 1, 7, 7)
    assert conv.supported(kernel, image, torch.empty(1, 3, 3, 3, 3))
    assert not conv.supported(kernel, image, torch.empty(1, 3, 3, 7, 7))
    assert not conv.supported(kernel, image, torch.empty(1, 17, 17, 3, 3))
    assert not conv.supported(kernel, torch.empty(2, 1, 33, 33), torch.empty(1, 3, 3, 3, 3))
