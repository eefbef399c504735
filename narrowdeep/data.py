"""The tasks that ``narrowdeep train`` knows: toy, digits, digits01, mnist, mnist01."""

from __future__ import annotations

import dataclasses
import gzip
import math
import numbers
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name torch's own documentation uses)

from narrowdeep.extras import install, optional

TaskName = Literal["toy", "digits", "digits01", "mnist", "mnist01"]
AccuracyKind = Literal["argmax", "threshold"]

TASKS: tuple[TaskName, ...] = ("toy", "digits", "digits01", "mnist", "mnist01")


@dataclass(frozen=True)
class Task:
    """A supervised task, split into training and test samples.

    Attributes:
        x_train, x_test: (N, in_features) and (N_test, in_features), entries in [0, 1].
        y_train, y_test: (N, out_features) and (N_test, out_features), dtype of ``x_train``.
        image_shape: (C, H, W) with ``C H W == in_features`` where a sample is an image, else None.
        accuracy_kind: "argmax" (one-hot targets), "threshold" (targets 0 and 1, cut at 0.5) or None (regression).
    """

    name: TaskName
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    image_shape: tuple[int, int, int] | None
    accuracy_kind: AccuracyKind | None

    @property
    def in_features(self) -> int:
        return self.x_train.shape[1]

    @property
    def out_features(self) -> int:
        return self.y_train.shape[1]

    def correct(self, prediction: Tensor, target: Tensor) -> Tensor:
        """How many rows of ``prediction`` (B, out) name the class of ``target`` (B, out): an integer scalar tensor.

        Raises: ValueError for a regression task.
        """
        if self.accuracy_kind is None:
            raise ValueError(f"task must have classes to count correct ones, got the regression task {self.name!r}")
        if self.accuracy_kind == "argmax":
            return (prediction.argmax(1) == target.argmax(1)).sum()
        return ((prediction > 0.5) == (target > 0.5)).all(1).sum()

    def to(self, device: torch.device | str) -> Task:
        """The same task with its four tensors on ``device``."""
        return dataclasses.replace(
            self,
            x_train=self.x_train.to(device),
            y_train=self.y_train.to(device),
            x_test=self.x_test.to(device),
            y_test=self.y_test.to(device),
        )


def load_task(
    name: str,
    *,
    data: str | Path | None = None,
    download: bool = False,
    pool: int = 1,
    samples: int = 200,
    dtype: torch.dtype = torch.float32,
) -> Task:
    """Load a task by name.

    Arguments:
        name: "toy", ``x1 x2`` on the circle arc (thesis section 5.1); "digits", the 1797 8x8 images bundled with
            scikit-learn, 1437 for training and 360 for testing in one fixed split, one-hot targets; "digits01", their
            digits 0 and 1, targets 0 and 1; "mnist", 28x28 images, one-hot targets; "mnist01", its digits 0 and 1,
            targets 0 and 1 (thesis section 5.2).
        data: folder that holds ``MNIST/raw``, needed by mnist and mnist01. Its four files are called
            ``train-images-idx3-ubyte`` and so on, or ``train-images.idx3-ubyte``; either may end in ``.gz``. Nothing
            else in ``data`` is read.
        download: let torchvision download the files that are missing.
        pool: side of an average pool over the images; must divide their height and width.
        samples: N of the toy task, at least 2.
        dtype: torch.float32 or torch.float64.

    Raises: TypeError or ValueError for a bad name, ``pool``, ``samples`` or ``dtype``; FileNotFoundError where MNIST is
        missing and ValueError where its files are damaged, or hold labels above 9 or, for mnist01, no 0 or no 1.
    """
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    counts: dict[str, Any] = {"pool": pool, "samples": samples}
    for argument, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{argument} must be an int, got {value!r}")
    if name == "toy":
        if pool != 1:
            raise ValueError(f"pool must be 1 for the toy task, which has no images, got {pool}")
        return _toy(samples, dtype)
    if name == "digits" or name == "digits01":
        return _digits(name, pool, dtype)
    return _mnist(name, data, download, pool, dtype)


def _toy(samples: int, dtype: torch.dtype) -> Task:
    if samples < 2:
        raise ValueError(f"samples must be at least 2, got {samples}")

    def arc(position: Tensor) -> tuple[Tensor, Tensor]:
        angle = position * (math.pi / 2 / samples)
        x = torch.stack((angle.cos(), angle.sin()), 1)
        return x.to(dtype), (x[:, :1] * x[:, 1:]).to(dtype)

    # Training angles are the midpoints of N equal arcs, test angles the N - 1 points where two arcs meet.
    position = torch.arange(samples, dtype=torch.float64)
    return Task("toy", *arc(position + 0.5), *arc(position[1:]), image_shape=None, accuracy_kind=None)


def _digits(name: Literal["digits", "digits01"], pool: int, dtype: torch.dtype) -> Task:
    with optional():
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images.reshape(-1, 1, 8, 8) / 16.0, labels, test_size=360, random_state=0, stratify=labels
    )
    splits = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in ((train, train_labels), (test, test_labels))]
    return _image_task(name, *splits, pool=pool, dtype=dtype)


def _mnist(
    name: Literal["mnist", "mnist01"], data: str | Path | None, download: bool, pool: int, dtype: torch.dtype
) -> Task:
    if data is None:
        raise ValueError(f"data must name the folder that holds MNIST/raw for task {name!r}, got None")
    raw = Path(data) / "MNIST" / "raw"
    missing = [file for file in _MNIST_FILES if _find_idx(raw, file) is None]
    if missing and download:
        _download_mnist(raw)
        missing = [file for file in _MNIST_FILES if _find_idx(raw, file) is None]
    if missing:
        raise FileNotFoundError(
            f"data must hold the 4 MNIST files in {raw} (or ask for the download), got none that is called "
            f"{', '.join(missing)}, with .idx for -idx, or with .gz at the end"
        )
    splits = []
    for part in ("train", "t10k"):
        images = _read_idx(raw, f"{part}-images-idx3-ubyte", 3)
        labels = _read_idx(raw, f"{part}-labels-idx1-ubyte", 1)
        if images.shape[1:] != (28, 28) or len(images) != len(labels) or len(images) == 0:
            got = f"{tuple(images.shape)} and {len(labels)} labels in {raw}"
            raise ValueError(f"data must hold 28x28 images and one label for each, got {got} ({part})")
        for label in (0, 1) if name == "mnist01" else ():
            if not (labels == label).any():
                raise ValueError(f"data must hold images of 0 and of 1 for {name!r}, got no {label} ({part}) in {raw}")
        if labels.max() > 9:
            place = int((labels > 9).argmax())
            got = f"{labels[place]} for image {place} ({part}) in {raw}"
            raise ValueError(f"data must hold labels from 0 to 9, got {got}")
        splits.append((torch.from_numpy(images)[:, None].to(torch.float64) / 255.0, torch.from_numpy(labels)))
    return _image_task(name, *splits, pool=pool, dtype=dtype)


_MNIST_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def _find_idx(raw: Path, name: str) -> Path | None:
    """One of MNIST's files under the names that it goes by, the unpacked one first."""
    names = (name, name.replace("-idx", ".idx"))
    for candidate in (*names, *(f"{n}.gz" for n in names)):
        if (raw / candidate).exists():
            return raw / candidate
    return None


def _read_idx(raw: Path, name: str, dims: int) -> np.ndarray:
    """An array of bytes (uint8) in the IDX format: two zeros, 8, the number of dimensions, big-endian sizes, the bytes.

    Raises: ValueError naming the file, before memory is taken that the file does not fill.
    """
    path = _find_idx(raw, name)
    assert path is not None
    try:
        if not path.is_file():
            raise ValueError("it is no regular file")
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            header = file.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims or header[:4] != bytes([0, 0, 8, dims]):
                raise ValueError(f"its header is not that of an IDX file of bytes in {dims} dimensions")
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
            size = math.prod(shape)
            # A byte of gzip holds at most 1032 bytes.
            if size > path.stat().st_size * (1032 if path.suffix == ".gz" else 1):
                raise ValueError(f"its header says {shape}, which is more than it holds")
            content = file.read(size + 1)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data must hold readable MNIST files, got the damaged {path}: {error}") from error
    if len(content) != size:
        raise ValueError(
            f"data must hold readable MNIST files, got the damaged {path}: its header says {shape}, it has "
            f"{'more' if len(content) > size else len(content)} bytes"
        )
    return np.frombuffer(bytearray(content), np.uint8).reshape(shape)


def _download_mnist(raw: Path) -> None:
    """Fetch the files that are missing, packed, with torchvision, which knows where they are and their checksums.

    Raises: ValueError without torchvision; OSError where no mirror has a file.
    """
    try:
        from torchvision.datasets import MNIST
        from torchvision.datasets.utils import download_url
    except ImportError as error:
        raise ValueError(f"download needs torchvision ({install('download')}): {error}") from error
    for packed, checksum in MNIST.resources:
        if _find_idx(raw, packed.removesuffix(".gz")) is not None:
            continue
        errors = []
        for mirror in MNIST.mirrors:
            try:
                download_url(f"{mirror}{packed}", root=str(raw), filename=packed, md5=checksum)
                break
            except (OSError, RuntimeError) as error:
                errors.append(f"{mirror}: {error}")
        else:
            raise OSError(f"data: {packed} cannot be downloaded ({'; '.join(errors)})")


def _image_task(
    name: TaskName, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], *, pool: int, dtype: torch.dtype
) -> Task:
    """A task from (N, 1, H, W) images in [0, 1] and (N,) labels; a name that ends in 01 keeps these two digits."""
    height, width = train[0].shape[2:]
    binary = name.endswith("01")
    if pool < 1 or height % pool or width % pool:
        raise ValueError(f"pool must be at least 1 and divide the {height}x{width} images of {name!r}, got {pool}")

    def tensors(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if binary:
            images, labels = images[labels <= 1], labels[labels <= 1]
        pooled = F.avg_pool2d(images, pool) if pool > 1 else images
        targets = labels[:, None] if binary else F.one_hot(labels.long(), 10)
        return pooled.flatten(1).to(dtype), targets.to(dtype)

    return Task(
        name,
        *tensors(*train),
        *tensors(*test),
        image_shape=(1, height // pool, width // pool),
        accuracy_kind="threshold" if binary else "argmax",
    )
