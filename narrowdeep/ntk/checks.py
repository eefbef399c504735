"""Numbers and arrays as this package takes them: Python's, NumPy's and torch's."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from narrowdeep.functional import check_tensor

Array = NDArray[np.float64]


def as_real(name: str, value: Any) -> float:
    """A number of any type as a float; infinite where it is too large for one.

    Raises: TypeError.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value == abs(value) else -math.inf


def as_array(name: str, value: Any) -> Array:
    """Real numbers in any tensor, array or nested list as float64 on the host; the same memory where it can be.

    Raises: TypeError for what is not numbers, or is complex.
    """
    if isinstance(value, Tensor):
        if value.is_complex():
            raise TypeError(f"{name} must be real, got {value.dtype}")
        return value.detach().to("cpu", torch.float64).numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}")
    return np.asarray(array, dtype=np.float64)


def as_samples(name: str, x: Any) -> Tensor:
    """A tensor as it is; a NumPy array of any byte order as a tensor on the host, longdouble as float64.

    Raises: TypeError for anything but float32 and float64.
    """
    if isinstance(x, np.ndarray):
        kind = x.dtype.newbyteorder("=")
        if kind == np.longdouble:
            kind = np.dtype(np.float64)
        if kind not in (np.float32, np.float64):
            raise TypeError(f"{name} must be torch.float32 or torch.float64, got {x.dtype}")
        # A copy where torch could not take the array: read only, or of negative strides.
        x = torch.from_numpy(np.require(x, dtype=kind, requirements=("C", "W")))
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__} (NumPy arrays are taken as well)")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be torch.float32 or torch.float64, got {x.dtype}")
    check_tensor(name, x)
    return x
