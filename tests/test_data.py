from __future__ import annotations

import gzip
import math
import os
import pickle
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from narrowdeep.data import TASKS, load_task


def test_toy_is_the_product_on_the_open_arc():
    task = load_task("toy", dtype=torch.float64)
    angle = torch.atan2(task.x_train[:, 1], task.x_train[:, 0])
    assert task.x_train.shape == (200, 2)
    assert task.y_train.shape == (200, 1)
    torch.testing.assert_close(task.x_train.square().sum(1), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close(task.y_train[:, 0], torch.sin(2 * angle) / 2)  # cos g sin g
    assert angle.min() > 0
    assert angle.max() < math.pi / 2
    torch.testing.assert_close(angle.diff(), torch.full((199,), math.pi / 400, dtype=torch.float64))


def test_toy_tests_between_its_training_points():
    task = load_task("toy", samples=5)
    train, test = (torch.atan2(x[:, 1], x[:, 0]) for x in (task.x_train, task.x_test))
    assert len(test) == 4
    torch.testing.assert_close(test, (train[:-1] + train[1:]) / 2)


def test_digits_hold_every_image_once_with_its_label():
    task = load_task("digits", dtype=torch.float64)
    assert (task.in_features, task.out_features, task.image_shape) == (64, 10, (1, 8, 8))
    assert (len(task.x_train), len(task.x_test)) == (1437, 360)
    images, labels = load_digits(return_X_y=True)
    expected = sorted((*image, label) for image, label in zip(images / 16, labels, strict=True))
    x, y = torch.cat((task.x_train, task.x_test)), torch.cat((task.y_train, task.y_test))
    assert torch.equal(y.sum(1), torch.ones(1797, dtype=torch.float64))
    got = sorted((*row, label) for row, label in zip(x.tolist(), y.argmax(1).tolist(), strict=True))
    assert np.array_equal(got, expected)
    again = load_task("digits", dtype=torch.float64)
    assert torch.equal(again.x_test, task.x_test)
    assert task.y_test.sum(0).min() >= 34  # every class in the test set, in proportion


def test_digits01_are_the_zeros_and_ones_of_digits():
    task, whole = load_task("digits01"), load_task("digits")
    assert (task.in_features, task.out_features, task.image_shape) == (64, 1, (1, 8, 8))
    for x, y, all_x, all_y in (
        (task.x_train, task.y_train, whole.x_train, whole.y_train),
        (task.x_test, task.y_test, whole.x_test, whole.y_test),
    ):
        label = all_y.argmax(1)
        assert torch.equal(x, all_x[label < 2])
        assert torch.equal(y[:, 0], label[label < 2].float())
    assert len(task.x_train) + len(task.x_test) == 178 + 182  # scikit-learn's count of each digit
    assert task.accuracy_kind == "threshold"


def test_pool_averages_blocks():
    whole, pooled = load_task("digits"), load_task("digits", pool=4)
    assert pooled.image_shape == (1, 2, 2)
    expected = whole.x_test.reshape(-1, 2, 4, 2, 4).mean((2, 4)).flatten(1)
    torch.testing.assert_close(pooled.x_test, expected)
    assert torch.equal(pooled.y_test, whole.y_test)


@pytest.mark.parametrize("name", ["toy", "digits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_tensor_has_the_dtype(name, dtype):
    task = load_task(name, dtype=dtype)
    assert {t.dtype for t in (task.x_train, task.y_train, task.x_test, task.y_test)} == {dtype}


def test_correct_counts_rows():
    digits = load_task("digits")
    target = torch.eye(10)[[3, 7, 7]]
    prediction = target.clone()
    prediction[1] = torch.eye(10)[0]
    assert digits.correct(prediction, target) == 2
    with pytest.raises(ValueError, match="regression task 'toy'"):
        load_task("toy").correct(prediction, target)


def _idx(path: Path, values: np.ndarray) -> None:
    """Write an array of bytes in the IDX format of the MNIST files."""
    path.write_bytes(struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes())


@pytest.fixture
def small_mnist(tmp_path: Path) -> Path:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 12), ("t10k", 5)):
        _idx(raw / f"{prefix}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        _idx(raw / f"{prefix}-labels-idx1-ubyte", (np.arange(count) % 4).astype(np.uint8))
    return tmp_path


def test_mnist_reads_files(small_mnist):
    task = load_task("mnist", data=small_mnist)
    assert task.x_train.shape == (12, 784)
    assert task.image_shape == (1, 28, 28)
    assert task.y_test.argmax(1).tolist() == [0, 1, 2, 3, 0]
    raw = (small_mnist / "MNIST/raw/train-images-idx3-ubyte").read_bytes()[16:]
    torch.testing.assert_close(task.x_train[3] * 255, torch.tensor(list(raw[3 * 784 : 4 * 784]), dtype=torch.float32))


def test_mnist01_keeps_two_digits(small_mnist):
    task = load_task("mnist01", data=small_mnist, pool=4)
    assert task.image_shape == (1, 7, 7)
    assert task.y_train.flatten().tolist() == [0, 1, 0, 1, 0, 1]
    assert task.y_test.flatten().tolist() == [0, 1, 0]
    both = load_task("mnist", data=small_mnist, pool=4)
    assert torch.equal(task.x_train, both.x_train[both.y_train.argmax(1) < 2])
    assert task.correct(torch.tensor([[0.4], [0.6], [0.6]]), task.y_test) == 2


def test_mnist_is_the_real_one(mnist_folder):
    task = load_task("mnist01", data=mnist_folder, pool=4)
    assert len(task.x_train) == 5923 + 6742  # zeros and ones in the training set (LeCun, Cortes, Burges)
    assert len(task.x_test) == 980 + 1135
    assert task.x_train.min() == 0
    assert task.x_train.max() <= 1


def test_mnist_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="data must hold the 4 MNIST files"):
        load_task("mnist", data=tmp_path)
    with pytest.raises(ValueError, match="data must name the folder.*got None"):
        load_task("mnist")


@pytest.mark.parametrize("content", [b"", b"\x00" * 3, b"\x00\x00\x08\x03" + b"\x00\x00\x00\x09" * 3 + b"12"])
def test_mnist_damaged(small_mnist, content):
    (small_mnist / "MNIST/raw/train-images-idx3-ubyte").write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        load_task("mnist", data=small_mnist)


NAMES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def assert_same_task(left, right):
    for name in ("x_train", "y_train", "x_test", "y_test"):
        assert torch.equal(getattr(left, name), getattr(right, name))


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_under_the_names_it_goes_by(small_mnist, dotted, packed):
    expected, raw = load_task("mnist", data=small_mnist), small_mnist / "MNIST" / "raw"
    for name in NAMES:
        content = (raw / name).read_bytes()
        (raw / name).unlink()
        new = name.replace("-idx", ".idx") if dotted else name
        (raw / (f"{new}.gz" if packed else new)).write_bytes(gzip.compress(content) if packed else content)
    assert_same_task(load_task("mnist", data=small_mnist), expected)


def test_mnist_needs_no_torchvision(small_mnist, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert len(load_task("mnist", data=small_mnist).x_train) == 12
    (small_mnist / "MNIST" / "raw" / NAMES[0]).unlink()
    with pytest.raises(ValueError, match="download needs torchvision"):
        load_task("mnist", data=small_mnist, download=True)


def test_what_lies_in_mnist_processed_is_not_read(small_mnist):
    """An old format of torchvision, whose tensors took the place of the files; pickles, which may run code."""
    expected, processed = load_task("mnist", data=small_mnist), small_mnist / "MNIST" / "processed"
    processed.mkdir()
    other = torch.zeros(3, 28, 28, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)
    for content in (None, pickle.dumps({"code": 1})):
        for name in ("training.pt", "test.pt"):
            if content is None:
                torch.save(other, processed / name)
            else:
                (processed / name).write_bytes(content)
        assert_same_task(load_task("mnist", data=small_mnist), expected)


def test_mnist_downloads_what_is_missing(small_mnist, monkeypatch):
    utils = pytest.importorskip("torchvision.datasets.utils")
    expected, raw = load_task("mnist", data=small_mnist), small_mnist / "MNIST" / "raw"
    asked = []

    def download(url: str, root: str, filename: str, md5: str) -> None:
        asked.append(filename)
        if len(asked) == 1:
            raise OSError("the first mirror is down")
        (Path(root) / filename).write_bytes(gzip.compress(content))

    content = (raw / NAMES[2]).read_bytes()
    (raw / NAMES[2]).unlink()
    monkeypatch.setattr(utils, "download_url", download)
    assert_same_task(load_task("mnist", data=small_mnist, download=True), expected)
    assert asked == [f"{NAMES[2]}.gz"] * 2


@pytest.mark.parametrize(("label", "part"), [(10, "train"), (255, "t10k")])
@pytest.mark.parametrize("task", ["mnist", "mnist01"])
def test_mnist_labels_that_are_no_digits(small_mnist, task, label, part):
    path = small_mnist / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte"
    content = bytearray(path.read_bytes())
    content[8 + 3] = label
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data must hold labels from 0 to 9, got {label} for image 3 .{part}. in "):
        load_task(task, data=small_mnist)


@pytest.mark.parametrize("part", ["train", "t10k"])
@pytest.mark.parametrize("label", [0, 1])
def test_mnist01_needs_zeros_and_ones(small_mnist, label, part):
    path = small_mnist / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte"
    content = path.read_bytes()
    path.write_bytes(content[:8] + bytes(7 if value == label else value for value in content[8:]))
    with pytest.raises(ValueError, match=f"data must hold images of 0 and of 1 for 'mnist01', got no {label} .{part}."):
        load_task("mnist01", data=small_mnist)
    load_task("mnist", data=small_mnist)


def idx(*sizes: int, dims: int = 3, kind: int = 8) -> bytes:
    return struct.pack(f">HBB{len(sizes)}I", 0, kind, dims, *sizes)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (idx(12, 28, 28, kind=13) + bytes(12 * 784), "header is not that of an IDX file of bytes in 3 dimensions"),
        (idx(12, 784, dims=2) + bytes(12 * 784), "header is not that of"),
        (idx(2**32 - 1, 2**32 - 1, 2**32 - 1), "its header says .4294967295, .* more than it holds"),
        (idx(12, 28, 28) + bytes(12 * 784 - 1), "it has 9407 bytes"),
        (idx(12, 28, 28) + bytes(12 * 784 + 1), "it has more bytes"),
        (b"PK\x03\x04" + bytes(100), "header is not that of"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_mnist_damage_is_named(small_mnist, content, reason, packed):
    path = small_mnist / "MNIST" / "raw" / NAMES[0]
    path.unlink()
    path = path.with_name(f"{path.name}.gz") if packed else path
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=f"got the damaged {path}: .*{reason}"):
        load_task("mnist", data=small_mnist)


def test_mnist_files_that_are_no_files(small_mnist):
    path = small_mnist / "MNIST" / "raw" / NAMES[1]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"got the damaged {path}: it is no regular file"):
        load_task("mnist", data=small_mnist)
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=f"got the damaged {path}: it is no regular file"):
        load_task("mnist", data=small_mnist)
    path.rmdir()
    path = path.with_name(f"{path.name}.gz")
    path.write_bytes(gzip.compress(bytes(100))[:-9])
    with pytest.raises(ValueError, match=f"got the damaged {path}: "):
        load_task("mnist", data=small_mnist)


@pytest.mark.parametrize("value", [2.0, "2", True, None])
def test_counts_must_be_ints(value):
    for argument in ("pool", "samples"):
        with pytest.raises(TypeError, match=f"{argument} must be an int, got {value!r}"):
            load_task("digits", **{argument: value})
    assert load_task("digits", pool=np.int64(4)).in_features == 4


def test_mnist_with_fewer_labels_than_images(small_mnist):
    raw = small_mnist / "MNIST" / "raw"
    shutil.copy(raw / "t10k-labels-idx1-ubyte", raw / "train-labels-idx1-ubyte")
    with pytest.raises(ValueError, match="one label for each"):
        load_task("mnist", data=small_mnist)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "cifar"}, f"task must be one of {', '.join(TASKS)}, got 'cifar'"),
        ({"name": "digits", "pool": 3}, "pool must be at least 1 and divide the 8x8 images of 'digits', got 3"),
        ({"name": "digits", "pool": 0}, "got 0"),
        ({"name": "toy", "pool": 2}, "pool must be 1 for the toy task"),
        ({"name": "toy", "samples": 1}, "samples must be at least 2, got 1"),
        ({"name": "toy", "dtype": torch.float16}, "dtype must be torch.float32 or torch.float64, got torch.float16"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_task(**arguments)
