"""Products that torch computes for us, in the dtype of their operands whatever the process has asked torch for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

_Result = TypeVar("_Result")

_PARENTS_FIRST = (
    ("generic", "all"),
    ("cuda", "all"),
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("mkldnn", "all"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
)
"""(backend, operation) of every ``fp32_precision`` of ``torch.backends``; one that is "none" is that of its parent."""

_get = torch._C._get_fp32_precision_getter
_set = torch._C._set_fp32_precision_setter


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No TF32, bfloat16 or autocast on ``device``, and convolutions by deterministic algorithms, chosen by no timer.

    The offset form lives on the last bits of float32: operands rounded to TF32 cost it a factor of 300. All settings
    are as before afterwards, those that follow a parent's included. They are the process's: a thread that multiplies
    matrices meanwhile does it in full precision, too.
    """
    cudnn = torch.backends.cudnn
    algorithms = cudnn.deterministic, cudnn.benchmark
    before = []
    for name in _PARENTS_FIRST:
        before.append(_get(*name))
        _set(*name, "none")  # else a child that follows it would read as if it had been set itself
    matmul = torch.get_float32_matmul_precision()  # the older setting, which torch compares with the newer ones
    try:
        torch.set_float32_matmul_precision("highest")
        for backend in ("cuda", "mkldnn"):
            _set(backend, "matmul", "ieee")
            _set(backend, "conv", "ieee")
        cudnn.deterministic, cudnn.benchmark = True, False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = algorithms
        torch.set_float32_matmul_precision(matmul)
        for name, value in zip(_PARENTS_FIRST, before, strict=True):
            _set(*name, value)


def at_full_precision(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """``function`` under ``full_precision`` on the device of its first tensor."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> _Result:
        device = next(a for a in args if isinstance(a, Tensor)).device
        with full_precision(device):
            return function(*args, **options)

    return call
