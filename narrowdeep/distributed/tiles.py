"""Kernels and features on disk, tile by tile over ranks: memory-mapped .npy files, complete or to be gone on with.

A file grows under ``PATH.part``, beside ``PATH.tiles``, which says what it is of and which tiles are there; ``PATH``
itself is there when all of them are. A tile's values depend on its samples alone, so the file is the same, bit for bit,
however many ranks write it, and whether or not they were stopped on the way.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from narrowdeep.checks import check_count
from narrowdeep.distributed.ranks import Ranks
from narrowdeep.files import errors_named
from narrowdeep.ntk.features import features

_SECONDS = 5.0
"""Of work that a kill may take back: the file is synced, and what is in it noted, after so many."""

Progress = Callable[[int, int], None]
"""Called with (tiles done, tiles in all), of this rank."""

_KEY = 32
"""Bytes at the beginning of ``PATH.tiles``."""


def write_kernel(
    path: str | Path,
    kernel: Callable[..., Any],
    x1: Tensor,
    x2: Tensor | None = None,
    *,
    tile: int = 1024,
    ranks: Ranks | None = None,
    on_tile: Progress | None = None,
) -> NDArray[Any]:
    """Evaluate a kernel of many samples into a memory-mapped .npy file, each rank a part of its tiles.

    A call that was stopped, or killed, goes on where it was: the same call, on any number of ranks. Of the narrow
    models' ``empirical_ntk`` the values are those of one call with all samples, bit for bit.

    Arguments:
        path: of the file, which is replaced where it is there; all ranks must reach it.
        kernel: ``kernel(x1, x2)`` and, where x2 is None, ``kernel(x1)``: (N1, N2, ...), a tensor or array, such as
            ``limit_ntk_mlp`` or ``functools.partial(empirical_ntk, model)``.
        x1, x2: (N1, ...) and (N2, ...), the same on all ranks; ``x2=None`` stands for x1, half the work.
        tile: samples of a side of a tile. Two tiles, in the kernel's dtype, are in memory.
        ranks: who shares the work; None: all of torch.distributed, or this process where that is not in use.
        on_tile: called with (tiles done, tiles in all), of this rank, after each.

    Returns: the kernel, (N1, N2, ...), read-only and not in memory.

    Raises: TypeError or ValueError naming the argument, the rule and the value; ValueError where ranks have different
        samples or kernels, or what is at ``path.part`` is the beginning of another kernel; OSError where the file
        cannot be written or the disk has no room for it; LostRankError.

    Examples:
        >>> import tempfile, torch
        >>> from narrowdeep.distributed import write_kernel
        >>> from narrowdeep.ntk import limit_ntk_mlp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     K = write_kernel(f"{folder}/kernel.npy", limit_ntk_mlp, torch.rand(100, 3), tile=30)
        ...     print(K.shape, K.dtype)
        (100, 100) float32
    """
    size = check_count("tile", tile, 1)
    right = x1 if x2 is None else x2
    rows, columns = (range(0, len(x), size) for x in (x1, right))
    tiles = [(i, j) for i in rows for j in columns if x2 is not None or j >= i]
    if not tiles:
        raise ValueError(f"x1 and x2 must have at least one sample, got {len(x1)} and {len(right)}")
    probe = array(kernel(x1[:1], right[-1:]))
    if probe.shape[:2] != (1, 1):
        raise ValueError(f"kernel must give (N1, N2, ...), got shape {probe.shape} for one sample and one")
    inner = probe.shape[2:]

    def compute(number: int) -> Iterator[tuple[Any, NDArray[Any]]]:
        i, j = tiles[number]
        left, other = x1[i : i + size], right[j : j + size]
        block = array(kernel(left) if x2 is None and i == j else kernel(left, other))
        if block.shape != (len(left), len(other), *inner):
            raise ValueError(f"kernel must give {(len(left), len(other), *inner)}, got {block.shape}")
        here, there = slice(i, i + size), slice(j, j + size)
        yield (here, there), block
        if x2 is None and i != j:
            order = (1, 0, *reversed(range(2, block.ndim)))  # of a kernel of matrices, these are transposed too
            yield (there, here), block.transpose(order)

    known = {"samples": _digest(x1, right), "kernel": _digest(probe), "tile": size}
    return _fill(path, (len(x1), len(right), *inner), probe.dtype, len(tiles), compute, known, ranks, on_tile)


def write_features(
    path: str | Path,
    model: nn.Module,
    x: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    tile: int = 1024,
    ranks: Ranks | None = None,
    on_tile: Progress | None = None,
) -> NDArray[Any]:
    """``narrowdeep.ntk.features`` of many samples in a memory-mapped .npy file, each rank a part of the rows.

    Arguments:
        path, ranks, on_tile: as in ``write_kernel``, and it goes on as that does.
        model, x, dtype: as in ``narrowdeep.ntk.features``.
        tile: samples at a time.

    Returns: (N, F), read-only and not in memory.

    Raises: as ``write_kernel`` and ``features``.

    Examples:
        >>> import tempfile, torch
        >>> from narrowdeep import DeepNarrowMLP
        >>> from narrowdeep.distributed import write_features
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     phi = write_features(f"{folder}/phi.npy", DeepNarrowMLP(2, 1, depth=50), torch.rand(9, 2))
        ...     print(phi.shape)
        (9, 54)
    """
    size = check_count("tile", tile, 1)
    probe = array(features(model, x[:1], dtype=dtype))
    if not len(x):
        raise ValueError("x must have at least one sample, got none")

    def compute(number: int) -> Iterator[tuple[Any, NDArray[Any]]]:
        rows = slice(number * size, (number + 1) * size)
        yield rows, array(features(model, x[rows], dtype=dtype))

    known = {"samples": _digest(x), "model": _digest(probe), "tile": size}
    return _fill(path, (len(x), probe.shape[1]), probe.dtype, -(-len(x) // size), compute, known, ranks, on_tile)


def array(value: Any) -> NDArray[Any]:
    """On the host."""
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _digest(*values: Any) -> str:
    found = hashlib.sha256()
    for value in map(array, values):
        found.update(f"{value.shape} {value.dtype}".encode())
        found.update(np.ascontiguousarray(value).data)
    return found.hexdigest()


def _fill(
    path: str | Path,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    count: int,
    compute: Callable[[int], Iterator[tuple[Any, NDArray[Any]]]],
    known: dict[str, Any],
    ranks: Ranks | None,
    on_tile: Progress | None,
) -> NDArray[Any]:
    """Write what ``compute`` gives for each tile, where it says; ``known`` is what the file is of."""
    ranks = Ranks.of() if ranks is None else ranks
    path = Path(path)
    part, notes = (path.with_name(path.name + ending) for ending in (".part", ".tiles"))
    ranks.require_same(known)
    failed: Exception | None = None
    if ranks.is_first:
        try:
            with errors_named(path):
                _prepare(part, notes, shape, dtype, count, hashlib.sha256(repr((shape, known)).encode()).digest())
        except (OSError, ValueError) as error:
            failed = error
    message = ranks.first(None if failed is None else str(failed))
    if message is not None:
        raise failed or ValueError(f"rank 0 has failed: {message}")

    done = np.memmap(notes, np.uint8, "r+", _KEY, (count,))
    own = [number for number in range(count) if number % ranks.size == ranks.rank]
    left = [number for number in own if not done[number]]
    with errors_named(path):
        written: list[int] = []
        data, synced = np.load(part, mmap_mode="r+"), time.monotonic()
        for position, number in enumerate(left, len(own) - len(left) + 1):
            for where, values in compute(number):
                data[where] = values
            written.append(number)
            if time.monotonic() - synced >= _SECONDS or position == len(own):
                data.flush()
                done[written] = 1
                done.flush()
                written.clear()
                data, synced = np.load(part, mmap_mode="r+"), time.monotonic()  # mapped anew: nothing stays in memory
            if on_tile is not None:
                on_tile(position, len(own))
        del data
        ranks.any(False)  # all are here
        if ranks.is_first:
            os.replace(part, path)
            notes.unlink()
        ranks.any(False)
        return np.load(path, mmap_mode="r")


def _prepare(part: Path, notes: Path, shape: tuple[int, ...], dtype: Any, count: int, key: bytes) -> None:
    """Make both files, or find those of the same call."""
    if part.exists() and notes.exists():
        found = notes.read_bytes()
        if len(found) != _KEY + count or found[:_KEY] != key:
            raise ValueError(
                f"path must not hold the beginning of another kernel (remove {part.name} and {notes.name}, or take "
                f"another one), got {part.with_suffix('')}"
            )
        return
    notes.unlink(missing_ok=True)
    np.lib.format.open_memmap(part, "w+", dtype, shape)  # zeros, of which the disk has none yet
    with open(part, "r+b") as file:
        if hasattr(os, "posix_fallocate"):  # a disk that is full would end the process later, by a signal
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    notes.write_bytes(key + bytes(count))
