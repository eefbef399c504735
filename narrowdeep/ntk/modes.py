"""The global modes that would change what is computed, and what two tensors must agree in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exact(devices: Iterable[str]) -> Iterator[None]:
    """Autocast is off on the CPU and on these kinds of device, and float32 products are float32 products."""
    with ExitStack() as stack:
        for device in {"cpu", *devices} - {"meta"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_full_precision())
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """float32 products are float32 products."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    backends: list[Any] = [torch.backends.cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend, value in zip(backends, before, strict=True):
            if value in ("tf32", "bf16"):
                backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            if backend.fp32_precision != value:
                backend.fp32_precision = "none"  # what it inherits, where that is what it had
                if backend.fp32_precision != value:
                    backend.fp32_precision = value


def check_alike(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Two tensors have the same dtype and device."""
    if x.dtype != other.dtype:
        raise TypeError(f"{name} and {other_name} must have the same dtype, got {x.dtype} and {other.dtype}")
    if x.device != other.device:
        raise ValueError(f"{name} and {other_name} must be on the same device, got {x.device} and {other.device}")
