"""The CUDA key of the raw ops, and what is available there. Importing it imports no Triton and asks no device.

Narrow chains run one sample a lane or on tensor cores, middling ones in ``tl.dot`` tiles, wider ones (and everything,
where Triton is missing or fails) one layer at a time through cuBLAS (``layered.py``). The choice follows from shapes,
dtypes and the device, for depth in parallel also from C_L.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from narrowdeep.ops.precision import full_precision

DTYPES = (torch.float32, torch.float64)

CHAIN_OPS = ("forward", "backward", "jvp", "backward_jvp")
"""Of a family, each with kernels of its own."""

OLDEST = (7, 5)
"""Compute capability of the oldest device that the kernels run on."""

_failures: dict[tuple[str, str], str] = {}
"""(op, device) -> why its kernels are not tried again in this process."""


_spared: dict[str, str] = {}
"""device -> why kernels of ``SPARE`` are not tried again in this process."""

SPARE = ("chain_segments", "join_", "chain_sequential", "backward_segments", "chain_whole", "add_sums")
"""How the names of kernels begin that others can stand in for: depth in parallel, and a backward in one launch."""


class KernelError(RuntimeError):
    """Triton could not compile or start a kernel."""

    def __init__(self, kernel: str, error: Exception) -> None:
        self.kernel = kernel
        lines = str(error).strip().splitlines() or [""]
        super().__init__(f"Triton failed at {kernel}: {type(error).__name__}: {lines[0]}")


@functools.cache
def missing() -> str | None:
    """Why the Triton kernels cannot be used on any device, or None."""
    if torch.version.hip is not None:
        return "this build of torch is for ROCm, the kernels are for CUDA"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a broken install must not take torch's own path down with it
        return f"the package triton cannot be imported: {error}"
    return None


@functools.cache
def _driver_fault() -> str | None:
    """Why Triton cannot start kernels on this machine's devices, or None. Compiles Triton's helper, once a machine."""
    try:
        importlib.import_module("triton.runtime").driver.active.launcher_cls  # noqa: B018 (made when first asked for)
    except Exception as error:
        if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
            return "Triton found no C compiler for its launcher: install gcc or clang, or name one in CC"
        if isinstance(error, subprocess.CalledProcessError):
            return f"Triton's launcher does not compile with {error.cmd[0]}: are the headers of Python installed?"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton found no usable driver: {lines[0]}"
    return None


def unusable(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on ``device``, or None. Only a CUDA device is asked for anything."""
    reason = missing()
    if reason is not None or device.type != "cuda":
        return reason
    found = torch.cuda.get_device_capability(device)
    if found < OLDEST:
        name, (major, minor) = torch.cuda.get_device_name(device), found
        return f"{name} is sm_{major}{minor}, the kernels need sm_{OLDEST[0]}{OLDEST[1]} or newer"
    return _driver_fault()


@functools.cache
def _warn(reason: str) -> None:
    """Once for every reason."""
    warnings.warn(f"layers run one at a time on this device, which is slower: {reason}", RuntimeWarning, stacklevel=3)


def spares(device: torch.device) -> bool:
    """Whether kernels of ``SPARE`` are left out on a device, where one has failed."""
    return str(device) in _spared


def check_tensors(tensors: list[Tensor]) -> None:
    """Raise TypeError for anything but float32 and float64, ValueError for tensors on different devices."""
    x = tensors[0]
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be torch.float32 or torch.float64, got {x.dtype}")
    for other in tensors:
        if other.device != x.device:
            raise ValueError(f"all tensors must be on one device, got {x.device} and {other.device}")


def register(library: torch.library.Library, name: str, kernels: str, otherwise: Callable[..., Any]) -> None:
    """Implement op ``name`` for CUDA tensors with the function of that name in module ``kernels``.

    The module is imported at the first call. Where its kernels cannot run, ``otherwise`` takes their place after one
    warning. Whatever torch computes in either runs in full precision.
    """

    def run(device: torch.device, *args: Any) -> Any:
        function = getattr(importlib.import_module(kernels), name)
        try:
            return function(*args)
        except KernelError as error:
            if spares(device) or not error.kernel.startswith(SPARE):
                raise
            _spared[str(device)] = str(error)
            warnings.warn(f"other kernels take its place on this device: {error}", RuntimeWarning, stacklevel=4)
            return function(*args)

    def call(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        check_tensors(tensors)
        device = tensors[0].device
        with full_precision(device):
            reason = unusable(device) or _failures.get((name, str(device)))
            if reason is None:
                try:
                    return run(device, *args)
                except KernelError as error:
                    reason = _failures[name, str(device)] = str(error)
            _warn(reason)
            return otherwise(*args)

    library.impl(name, call, "CUDA")


def register_chain(library: torch.library.Library, family: str) -> None:
    """``register`` the ops of a family; ``layered.py`` takes the place of missing kernels."""
    layered = importlib.import_module(f"narrowdeep.ops.{family}.layered")
    for op in CHAIN_OPS:
        name = f"{family}_{op}"
        register(library, name, f"narrowdeep.ops.{family}.triton", getattr(layered, name))


def backward_workspace(x: Tensor, hidden_weight: Tensor, offset: bool, segment: int) -> int | None:
    """Bytes that the Triton backward takes within a segment or a group of them; None where layers run one at a time.

    Tensors on the meta device stand for an H100.
    """
    if unusable(x.device):
        return None
    from narrowdeep.ops import triton_backward
    from narrowdeep.ops.cnn.triton import FAMILY as CNN
    from narrowdeep.ops.mlp.triton import FAMILY as MLP

    return triton_backward.workspace(CNN if x.dim() == 4 else MLP, x, hidden_weight, offset, segment)


def triton_status() -> dict[str, Any]:
    """What ``narrowdeep info`` says about the Triton kernels; asks a device, if there is one, for its architecture.

    Keys: ``available``, ``reason`` (None if available), ``version``, ``device`` (name or None), ``dtypes``,
    ``kernels`` (kernel -> the shapes it supports; the rest runs one layer at a time).
    """
    reason = missing()
    version = None if reason else importlib.metadata.version("triton")
    device = None
    if reason is None:
        if torch.version.cuda is None:
            reason = "this build of torch has no CUDA"
        elif not torch.cuda.is_available():  # asks the driver, starts no context
            reason = "no CUDA device was found"
        else:
            device = torch.cuda.get_device_name()
            reason = unusable(torch.device("cuda")) or "; ".join(_failures.values()) or None
    kernels = {}
    if version is not None:
        from narrowdeep.ops.cnn.triton import limits as cnn_limits
        from narrowdeep.ops.gram.triton import WIDEST
        from narrowdeep.ops.mlp.triton import widest
        from narrowdeep.ops.triton_common import capability
        from narrowdeep.ops.triton_shooting import limits as parallel_limits

        target = capability(torch.device("cuda" if device else "cpu"))
        past = "past that one layer at a time"
        for kernel in CHAIN_OPS:
            most = {str(d).removeprefix("torch."): widest(kernel, d, target) for d in DTYPES}
            widths = ", ".join(f"width <= {width} in {dtype}" for dtype, width in most.items())
            kernels[f"mlp {kernel}"] = f"{widths}; {past} (cuBLAS)"
            kernels[f"cnn {kernel}"] = f"{cnn_limits(kernel)}; {past} (cuDNN)"
        for kernel, limits in parallel_limits().items():
            kernels[f"mlp {kernel}, depth in parallel"] = limits
        kernels["mlp gram"] = f"width <= {WIDEST}; {past}"
        kernels["cnn gram"] = f"{cnn_limits('backward')}; {past}"
    return {
        "available": reason is None,
        "reason": reason,
        "version": version,
        "device": device,
        "dtypes": [str(dtype).removeprefix("torch.") for dtype in DTYPES],
        "kernels": kernels,
    }
