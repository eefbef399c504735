"""Where the Triton kernels cannot run: the layer-by-layer path, one warning, the reason in ``narrowdeep info``."""

from __future__ import annotations

import re
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from torch._subclasses import FakeTensorMode

from narrowdeep.ops import triton_dispatch
from narrowdeep.ops.mlp import layered
from tests.gpu.cases import Case, SecondCase, draw_inputs, draw_second

CUDA = torch.device("cuda", 0)
SETTINGS = (10.0, True, 1, 0, 2)
"""scale, offset, outputs, start, segment"""


class Recorder:
    """In place of torch's library: keeps what is registered."""

    def __init__(self) -> None:
        self.implementations: dict[str, Callable[..., Any]] = {}

    def impl(self, name: str, function: Callable[..., Any], key: str) -> None:
        assert key == "CUDA"
        self.implementations[name] = function


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No failure, no warning and no question to the machine is remembered from one test to the next."""
    caches = (triton_dispatch.missing, triton_dispatch._driver_fault, triton_dispatch._warn)
    for cached in caches:
        cached.cache_clear()
    with mock.patch.dict(triton_dispatch._failures, clear=True), mock.patch.dict(triton_dispatch._spared, clear=True):
        yield
    for cached in caches:
        cached.cache_clear()


def registered(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    recorder: Any = Recorder()
    triton_dispatch.register(recorder, "mlp_forward", "narrowdeep.ops.mlp.triton", otherwise)
    return recorder.implementations["mlp_forward"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"x must be torch\.float32 or torch\.float64, got " + str(dtype)):
        registered(lambda *_: None)(torch.zeros(2, 1, dtype=dtype))


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="all tensors must be on one device, got cpu and meta"):
        registered(lambda *_: None)(torch.zeros(2, 1), torch.zeros(3, device="meta"))


def test_without_triton_layers_run_one_at_a_time() -> None:
    with mock.patch.object(triton_dispatch, "missing", return_value="the package triton is not installed"):
        with pytest.warns(RuntimeWarning, match="one at a time .*: the package triton is not installed"):
            assert registered(lambda x: ("layered", x.shape))(torch.zeros(2, 1)) == ("layered", (2, 1))
        registered(lambda x: x)(torch.zeros(2, 1))  # one warning is enough
        status = triton_dispatch.triton_status()
    assert not status["available"]
    assert status["reason"] == "the package triton is not installed"
    assert status["version"] is None


def test_missing_names_the_package() -> None:
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert triton_dispatch.missing() == "the package triton is not installed"


def test_rocm_has_no_kernels() -> None:
    with mock.patch("torch.version.hip", "7.0"):
        assert triton_dispatch.missing() == "this build of torch is for ROCm, the kernels are for CUDA"
        assert "ROCm" in triton_dispatch.triton_status()["reason"]


class Driver:
    """In place of Triton's: fails when it is first asked for anything."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    @property
    def active(self) -> Any:
        raise self.error


@pytest.mark.parametrize(
    ("error", "compiler", "reason"),
    [
        (RuntimeError("Failed to find C compiler."), None, "found no C compiler for its launcher: install gcc"),
        (RuntimeError("0 active drivers ([])\nmore"), "/bin/gcc", r"no usable driver: 0 active drivers \(\[\]\)$"),
        (subprocess.CalledProcessError(1, ["gcc", "x.c"]), "/bin/gcc", "does not compile with gcc: are the headers"),
    ],
)
def test_a_driver_that_does_not_start(error: Exception, compiler: str | None, reason: str, monkeypatch: Any) -> None:
    runtime = pytest.importorskip("triton.runtime", reason="needs Triton")
    monkeypatch.delenv("CC", raising=False)
    with (
        mock.patch.object(runtime, "driver", Driver(error)),
        mock.patch("shutil.which", return_value=compiler),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
    ):
        found = triton_dispatch.unusable(CUDA)
    assert found is not None
    assert re.search(reason, found), found


@pytest.mark.parametrize(("found", "refused"), [((7, 0), True), ((7, 5), False), ((10, 3), False)])
def test_an_older_device(found: tuple[int, int], refused: bool) -> None:
    with (
        mock.patch.object(triton_dispatch, "missing", return_value=None),
        mock.patch.object(triton_dispatch, "_driver_fault", return_value=None),
        mock.patch("torch.cuda.get_device_capability", return_value=found),
        mock.patch("torch.cuda.get_device_name", return_value="Tesla V100"),
    ):
        expected = "Tesla V100 is sm_70, the kernels need sm_75 or newer" if refused else None
        assert triton_dispatch.unusable(CUDA) == expected


def test_a_kernel_that_does_not_compile_is_tried_once() -> None:
    """The result is the layer-by-layer path's; the next call warns of nothing and starts nothing."""
    pytest.importorskip("triton", reason="needs Triton")
    from narrowdeep.ops import triton_chain

    inputs = draw_inputs(Case(1, 1, 9, 5, True, torch.float64, 0))
    expected = layered.mlp_forward(*inputs, *SETTINGS)
    failing = mock.Mock(side_effect=triton_dispatch.KernelError("chain_forward", ValueError("too many registers\nat")))
    forward = registered(layered.mlp_forward)
    with mock.patch.object(triton_chain, "launch", failing):
        reason = "Triton failed at chain_forward: ValueError: too many registers"
        with pytest.warns(RuntimeWarning, match=f"one at a time .*: {reason}$"):
            first = forward(*inputs, *SETTINGS)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = forward(*inputs, *SETTINGS)
    assert failing.call_count == 1
    for result in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
    with (
        mock.patch("torch.version.cuda", "13.0"),
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.get_device_name", return_value="H100"),
        mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)),
        mock.patch.object(triton_dispatch, "_driver_fault", return_value=None),
    ):
        status = triton_dispatch.triton_status()
    assert (status["available"], status["reason"]) == (False, reason)


def test_a_second_derivative_whose_kernel_does_not_compile() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from narrowdeep.ops import triton_chain

    recorder: Any = Recorder()
    triton_dispatch.register_chain(recorder, "mlp")
    assert set(recorder.implementations) == {"mlp_forward", "mlp_backward", "mlp_jvp", "mlp_backward_jvp"}
    arguments = *draw_second(SecondCase(Case(1, 1, 9, 5, True, torch.float64, 0))), True, True
    expected = layered.mlp_backward_jvp(*arguments)
    failing = mock.Mock(side_effect=triton_dispatch.KernelError("chain_tangents", ValueError("too many registers")))
    with mock.patch.object(triton_chain, "launch", failing), pytest.warns(RuntimeWarning, match="chain_tangents"):
        found = recorder.implementations["mlp_backward_jvp"](*arguments)
    assert failing.call_count == 1
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kernel", ["chain_segments", "join_gradients", "add_sums"])
def test_a_spare_kernel_that_does_not_compile(kernel: str) -> None:
    """The chain's ordinary kernels take its place, for all ops on the device, after one warning."""
    pytest.importorskip("triton", reason="needs Triton")
    from narrowdeep.ops import triton_backward, triton_chain, triton_shooting
    from narrowdeep.ops.mlp import triton as mlp

    batch, layers, n = 8192 if kernel == "add_sums" else 5, 3000, 4
    x, shapes = torch.empty(batch, 2, device="meta"), ((n, 2), (n,), (layers, n, n), (layers, n), (1, n), (1,))
    params = [torch.empty(shape, device="meta") for shape in shapes]
    started: list[str] = []

    def launch(function: Any, *args: Any, **constants: Any) -> None:
        started.append(function.fn.__name__)
        if started[-1] == kernel:
            raise triton_dispatch.KernelError(kernel, ValueError("no such thing"))

    recorder: Any = Recorder()
    triton_dispatch.register_chain(recorder, "mlp")

    def step() -> None:
        settings = 1e4, True, 1, 0, 100
        out, saved = recorder.implementations["mlp_forward"](x, *params, *settings)
        recorder.implementations["mlp_backward"](out, x, *params, saved, *settings, True, True)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(triton_dispatch, "full_precision", return_value=nullcontext()))
        for module in (triton_chain, triton_shooting, triton_backward, mlp):
            stack.enter_context(mock.patch.object(module, "launch", launch))
        with pytest.warns(RuntimeWarning, match="other kernels take its place on this device: .*no such thing"):
            step()
        assert started.count(kernel) == 1
        started.clear()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step()
    assert "chain_backward" in started
    assert not any(name.startswith(triton_dispatch.SPARE) for name in started)


def test_our_own_errors_are_not_taken_for_a_kernels() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from narrowdeep.ops import triton_chain

    inputs = draw_inputs(Case(1, 1, 9, 5, True, torch.float64, 0))
    failing = mock.Mock(side_effect=torch.OutOfMemoryError("full"))
    with mock.patch.object(triton_chain, "empty", failing), pytest.raises(torch.OutOfMemoryError):
        registered(layered.mlp_forward)(*inputs, *SETTINGS)


def test_whatever_triton_raises_is_a_kernel_error() -> None:
    pytest.importorskip("triton", reason="needs Triton")
    from narrowdeep.ops import triton_common

    kernel = mock.MagicMock()
    kernel.fn.__name__ = "chain_jvp"
    kernel.__getitem__.return_value.side_effect = subprocess.CalledProcessError(1, ["ptxas"])
    with FakeTensorMode():
        tensor = torch.empty(3, device=CUDA)
    with (
        mock.patch("torch.cuda.device", nullcontext),
        pytest.raises(triton_dispatch.KernelError, match="Triton failed at chain_jvp: CalledProcessError: Command"),
    ):
        triton_common.launch(kernel, (1,), tensor, num_warps=1)
