"""Arrays that a user hands in as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_array(name: str, path: Path, shape: str, dtype: type[np.floating]) -> np.ndarray:
    """The numbers of the .npy file that the option ``name`` gives, as ``dtype`` of this machine's byte order.

    Any real type is taken: integers, either byte order, longdouble. ``shape``, such as "(N, in)", says the dimensions.
    The file is mapped, so that a header that promises more than the file holds is refused before memory is asked for.

    Raises: OSError; ValueError for what is not a .npy file, another number of dimensions, no numbers, or a number that
    is not finite or does not fit ``dtype``.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} must be a .npy file of numbers, got {path}, which is not a regular file")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a broken header is parsed as Python: SyntaxError, RecursionError, MemoryError, ...
        reason = "it is empty" if isinstance(error, EOFError) else str(error) or type(error).__name__
        raise ValueError(f"{name} must be a .npy file of numbers, got {path}: {reason}") from None
    if not isinstance(found, np.ndarray) or found.ndim != shape.count(",") + 1 or found.size == 0:
        got = getattr(found, "shape", "an archive")
        raise ValueError(f"{name} must hold one array {shape}, not empty, got {got} in {path}")
    if found.dtype.kind not in "fiub":
        raise ValueError(f"{name} must hold real numbers, got {found.dtype} in {path}")
    with np.errstate(over="ignore"):
        array = np.array(found, dtype=dtype)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        index = tuple(bad[0].tolist())
        rule = f"numbers that {np.dtype(dtype)} can hold" if np.isfinite(found[index]) else "finite numbers"
        raise ValueError(f"{name} must hold {rule}, got {found[index]} at {list(index)} in {path}")
    return array
