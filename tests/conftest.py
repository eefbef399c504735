"""What every test shares: one seed, hypothesis without deadlines, data sets and devices that may be missing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Machines under load miss deadlines; in CI the same examples are tried every time.
settings.register_profile("narrowdeep", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("narrowdeep")


def pytest_sessionstart() -> None:
    """``make sanitize`` must not pass with another engine than the one it has built."""
    if os.environ.get("NARROWDEEP_SANITIZE"):
        engine = importlib.util.find_spec("narrowdeep._C")
        if engine is None or engine.origin is None or b"__asan_init" not in Path(engine.origin).read_bytes():
            pytest.exit("NARROWDEEP_SANITIZE is set, but the engine was built without sanitizers", 3)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # not the keyword: tests/gpu has that name too
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that call ``torch.set_num_threads``: the number is put back afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mnist_folder() -> Path:
    """Folder that holds ``MNIST/raw``, from the environment variable NARROWDEEP_DATA; skips without it."""
    folder = os.environ.get("NARROWDEEP_DATA")
    if folder is None or not (Path(folder) / "MNIST" / "raw").is_dir():
        pytest.skip("needs MNIST: set NARROWDEEP_DATA to the folder that holds MNIST/raw")
    return Path(folder)
