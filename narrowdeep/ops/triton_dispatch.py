"""The CUDA key of the raw ops, and what is available there. Importing it imports no Triton and asks no device.

Narrow chains run one sample a lane, middling ones in ``tl.dot`` tiles, wider ones (and everything, where Triton is
missing) one layer at a time through cuBLAS (``layered.py``). The choice follows from shapes and dtypes alone.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


@functools.cache
def missing() -> str | None:
    """Why the Triton kernels cannot be used, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # a broken install must not take torch's own path down with it
        return f"the package triton cannot be imported: {error}"
    return None


def check_dtype(x: Tensor) -> None:
    """Raise TypeError for anything but float32 and float64."""
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be torch.float32 or torch.float64, got {x.dtype}")


def register(library: torch.library.Library, name: str, kernels: str, otherwise: Callable[..., Any]) -> None:
    """Implement op ``name`` for CUDA tensors with the function of that name in module ``kernels``.

    The module is imported at the first call; where Triton is missing ``otherwise`` takes its place.
    """

    def call(*args: Any) -> Any:
        check_dtype(next(a for a in args if isinstance(a, Tensor)))
        function = otherwise if missing() else getattr(importlib.import_module(kernels), name)
        return function(*args)

    library.impl(name, call, "CUDA")


def register_chain(library: torch.library.Library, family: str) -> None:
    """``register`` forward, backward and jvp of a family; ``layered.py`` takes the place of missing kernels."""
    layered = importlib.import_module(f"narrowdeep.ops.{family}.layered")
    for op in ("forward", "backward", "jvp"):
        name = f"{family}_{op}"
        register(library, name, f"narrowdeep.ops.{family}.triton", getattr(layered, name))


def backward_workspace(x: Tensor, hidden_weight: Tensor, offset: bool, segment: int) -> int | None:
    """Bytes that the Triton backward takes within a segment or a group of them; None where layers run one at a time.

    Tensors on the meta device stand for an H100.
    """
    if missing():
        return None
    from narrowdeep.ops import triton_chain
    from narrowdeep.ops.cnn.triton import FAMILY as CNN
    from narrowdeep.ops.mlp.triton import FAMILY as MLP

    return triton_chain.workspace(CNN if x.dim() == 4 else MLP, x, hidden_weight, offset, segment)


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
    kernels = {}
    if version is not None:
        from narrowdeep.ops.cnn.triton import limits as cnn_limits
        from narrowdeep.ops.gram.triton import WIDEST
        from narrowdeep.ops.mlp.triton import widest
        from narrowdeep.ops.triton_common import capability

        target = capability(torch.device("cuda" if device else "cpu"))
        past = "past that one layer at a time"
        for kernel in ("forward", "backward", "jvp"):
            most = {str(d).removeprefix("torch."): widest(kernel, d, target) for d in DTYPES}
            widths = ", ".join(f"width <= {width} in {dtype}" for dtype, width in most.items())
            kernels[f"mlp {kernel}"] = f"{widths}; {past} (cuBLAS)"
            kernels[f"cnn {kernel}"] = f"{cnn_limits(kernel)}; {past} (cuDNN)"
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
