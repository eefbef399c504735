"""Kernels and features on disk, over ranks and after a kill, and the system of regression from such a file."""

from __future__ import annotations

import functools
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from narrowdeep import DeepNarrowCNN, DeepNarrowMLP
from narrowdeep.distributed import solve, write_features, write_kernel
from narrowdeep.ntk import NTKRegressor, empirical_ntk, features, limit_ntk_mlp
from tests.distributed.ranks import run


def network(kind: str, dtype: torch.dtype, *, trained: bool = True) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(2)
    model: Any = DeepNarrowMLP(3, 2, 40, scale=10.0, dtype=dtype)
    if kind == "cnn":
        model = DeepNarrowCNN(1, 2, 12, scale=10.0, dtype=dtype, chunks=2)
    model.reset_parameters(generator)
    with torch.no_grad():
        for p in model.parameters() if trained else ():
            p.add_(0.01 * torch.randn(p.shape, generator=generator, dtype=dtype))
    return model, torch.rand(23, *((1, 5, 4) if kind == "cnn" else (3,)), generator=generator, dtype=dtype)


def _written(rank: int, folder: str, kind: str, dtype: torch.dtype, reduce: Any) -> Any:
    model, x = network(kind, dtype)
    kernel = functools.partial(empirical_ntk, model, reduce=reduce)
    seen: list[tuple[int, int]] = []
    square = write_kernel(f"{folder}/square.npy", kernel, x, tile=5, on_tile=lambda *done: seen.append(done))
    assert not square.flags.writeable
    oblong = write_kernel(f"{folder}/oblong.npy", kernel, x, x[:7] / 2, tile=5)
    at_start, _ = network(kind, dtype, trained=False)
    phi = write_features(f"{folder}/phi.npy", at_start, x, tile=4)
    return seen, [torch.from_numpy(np.array(found)) for found in (square, oblong, phi)]


@pytest.mark.parametrize(
    ("kind", "dtype", "reduce"),
    [
        ("mlp", torch.float32, "full"),
        ("cnn", torch.float64, "full"),
        ("mlp", torch.float64, "trace"),
        ("cnn", torch.float32, "diagonal"),
    ],
)
def test_ranks_write_the_bits_of_one_call(tmp_path: Path, kind: str, dtype: torch.dtype, reduce: Any) -> None:
    model, x = network(kind, dtype)
    expected = [empirical_ntk(model, x, reduce=reduce), empirical_ntk(model, x, x[:7] / 2, reduce=reduce)]
    expected.append(torch.cat([features(network(kind, dtype, trained=False)[0], rows) for rows in x.split(4)]))
    for rank, (seen, found) in enumerate(run(_written, 2, str(tmp_path), kind, dtype, reduce)):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        count = 8 - rank  # of 15 tiles on and above the diagonal
        assert seen == [(i + 1, count) for i in range(count)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["oblong.npy", "phi.npy", "square.npy"]


def slow_kernel(calls: list[int], x1: Tensor, x2: Tensor | None = None) -> Tensor:
    calls.append(len(x1))
    return limit_ntk_mlp(x1, x2)


def _killed(rank: int, path: str, monkeypatched: float, count: int) -> None:
    from narrowdeep.distributed import tiles

    tiles._SECONDS = monkeypatched
    x = torch.rand(count, 3, generator=torch.Generator().manual_seed(1))

    def die(done: int, _: int) -> None:
        if done == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    write_kernel(path, limit_ntk_mlp, x, tile=10, on_tile=die)


def test_a_kernel_goes_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "kernel.npy"
    x = torch.rand(95, 3, generator=torch.Generator().manual_seed(1))
    expected = np.array(write_kernel(tmp_path / "whole.npy", limit_ntk_mlp, x, tile=10))
    assert np.allclose(expected, limit_ntk_mlp(x), rtol=1e-6)
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        run(_killed, 2, str(path), 0.0, 95)
    assert not path.exists()
    done = np.frombuffer((tmp_path / "kernel.npy.tiles").read_bytes()[32:], np.uint8).reshape(55)
    assert done[1::2].sum() == 4  # of the rank that was killed
    part = np.load(tmp_path / "kernel.npy.part", mmap_mode="r")
    assert np.array_equal(part[:10, 10:20], expected[:10, 10:20])
    with pytest.raises(ValueError, match="must not hold the beginning of another kernel .remove kernel.npy.part"):
        write_kernel(path, limit_ntk_mlp, x + 1, tile=10)
    with pytest.raises(ValueError, match="must not hold the beginning"):
        write_kernel(path, functools.partial(limit_ntk_mlp, beta=2.0), x, tile=10)
    calls: list[int] = []
    again = write_kernel(path, functools.partial(slow_kernel, calls), x, tile=10)
    assert np.array_equal(again, expected)
    assert len(calls) == 1 + 55 - done.sum()  # one to see what it gives
    assert {entry.name for entry in tmp_path.iterdir()} == {"kernel.npy", "whole.npy"}


def _different(rank: int, folder: str) -> list[str]:
    found = []
    x = torch.rand(9, 3, generator=torch.Generator().manual_seed(1)).double()
    kernels: list[Any] = [functools.partial(limit_ntk_mlp, beta=1.0 + rank), limit_ntk_mlp]
    for kernel, samples in zip(kernels, (x, x + rank), strict=True):
        try:
            write_kernel(f"{folder}/kernel.npy", kernel, samples)
        except ValueError as error:  # noqa: PERF203 (two calls)
            found.append(str(error).partition(":")[0])
    for path, y in ((f"{folder}/missing/kernel.npy", x[:, 0]), ("", x[:, rank])):
        try:
            write_kernel(path, limit_ntk_mlp, x) if path else solve(limit_ntk_mlp(x), y, ridge=0.1)
        except (OSError, ValueError) as error:  # noqa: PERF203 (two calls)
            found.append(f"{type(error).__name__}: {str(error).partition(': rank')[0]}")
    return found


def test_ranks_with_other_samples_or_kernels(tmp_path: Path) -> None:
    first, other = run(_different, 2, str(tmp_path))
    assert first[:2] == other[:2] == ["ranks must have the same kernel", "ranks must have the same samples"]
    assert first[2].startswith("OSError: ")
    assert first[2].endswith("missing/kernel.npy cannot be written: No such file or directory")
    assert other[2] == f"ValueError: rank 0 has failed: {first[2].removeprefix('OSError: ')}"
    assert first[3] == other[3] == "ValueError: ranks must have the same y"
    assert list(tmp_path.iterdir()) == []


def test_what_no_kernel_is(tmp_path: Path) -> None:
    x = torch.rand(5, 3)
    with pytest.raises(ValueError, match=r"kernel must give \(N1, N2, ...\), got shape \(1,\)"):
        write_kernel(tmp_path / "k.npy", lambda a, b=None: a[:, 0], x)
    with pytest.raises(ValueError, match=r"kernel must give \(2, 2\), got \(3, 3\)"):
        write_kernel(
            tmp_path / "k.npy", lambda a, b=None: torch.ones(1, 1) if b is not None else torch.ones(3, 3), x, tile=2
        )
    with pytest.raises(ValueError, match="at least one sample, got 5 and 0"):
        write_kernel(tmp_path / "k.npy", limit_ntk_mlp, x, x[:0])
    with pytest.raises(ValueError, match="tile must be at least 1, got 0"):
        write_kernel(tmp_path / "k.npy", limit_ntk_mlp, x, tile=0)


# ---- the system ----


def problem(count: int = 200) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    x = torch.rand(count, 4, dtype=torch.float64, generator=generator)
    return x, torch.stack([x.prod(1), x.sin().sum(1), 0 * x[:, 0]], 1)


def _solved(rank: int, path: str) -> Any:
    x, y = problem()
    kernel = write_kernel(path, limit_ntk_mlp, x, tile=64)
    found = [solve(kernel, y, ridge=1e-3, tolerance=1e-10, landmarks=landmarks) for landmarks in (1, 30, 1000)]
    return [*found, solve(kernel, y[:, 0], ridge=1e-3, tolerance=1e-10)]


def test_the_system_is_that_of_regression(tmp_path: Path) -> None:
    x, y = problem()
    expected = torch.linalg.solve(limit_ntk_mlp(x) + 1e-3 * torch.eye(len(x)).double(), y)
    results = [_solved(0, str(tmp_path / "one.npy")), *run(_solved, 3, str(tmp_path / "three.npy"))]
    for *found, single in results:
        for solution in found:
            torch.testing.assert_close(solution, expected, rtol=1e-6, atol=1e-6)
            assert not solution[:, 2].any()
        torch.testing.assert_close(single, expected[:, 0], rtol=1e-6, atol=1e-6)
    assert all(torch.equal(a, b) for found in results[2:] for a, b in zip(found, results[1], strict=True))
    other = torch.rand(7, 4, dtype=torch.float64)
    regressor = NTKRegressor(limit_ntk_mlp, ridge=1e-3).fit(x.numpy(), y.numpy())
    predicted = limit_ntk_mlp(other, x) @ results[0][0]
    np.testing.assert_allclose(predicted, regressor.predict(other.numpy()), atol=1e-8)


def test_what_cannot_be_solved() -> None:
    x, y = problem(40)
    kernel = limit_ntk_mlp(x)
    with pytest.raises(np.linalg.LinAlgError, match="not converged in 3 iterations with ridge=1e-08"):
        solve(kernel, y, ridge=1e-8, landmarks=1, iterations=3)
    for wrong, message in (
        ((kernel[:, :3], y), r"kernel must be \(N, N\) and y"),
        ((kernel, y[:3]), r"kernel must be \(N, N\) and y .*\(40, 40\) and \(3, 3\)"),
        ((-kernel, y), "kernel must be finite, with a diagonal above 0"),
        ((kernel, y / 0), "y must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            solve(*wrong)
    with pytest.raises(ValueError, match="ridge must be finite and not negative, got -1"):
        solve(kernel, y, ridge=-1)
    with pytest.raises(ValueError, match="tolerance must be finite and positive"):
        solve(kernel, y, tolerance=0)
    assert not dist.is_initialized()
