"""Images in memory, made up in their own formats on disk: what they give and refuse."""

import pickle
import shutil
import struct
from collections import Counter
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from sj_taid import data
from tests.data.made_up import cut, first, is_locked, ready

# Digits


def test_digits():
    digits = ready(data.Digits)
    assert len(digits.train_set) == 1438 and len(digits.test_set) == 359
    images, labels = first(digits.train_dataloader())
    assert images.shape == (50, 1, 16, 16) and labels.shape == (50,)
    everything = [torch.cat(parts) for parts in zip(*digits.test_dataloader(), strict=True)]
    assert everything[0].min() == -1 and everything[0].max() == 1
    assert set(everything[1].tolist()) == set(range(10))
    assert all(len(x) == 50 for x, _ in digits.train_dataloader())
    assert len(everything[0]) == 359


# MNIST and FashionMNIST


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(data.MNIST, "counts", (600, 100))


def write_idx(root, folder="MNIST", train_images=600, test_images=100):
    """Files of MNIST's format, with made-up pixels."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", train_images), ("t10k", test_images)):
        pixels = (torch.arange(n * 784) % 256).to(torch.uint8)
        labels = (torch.arange(n) % 10).to(torch.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, n, 28, 28) + pixels.numpy().tobytes()
        )
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x801, n) + labels.numpy().tobytes()
        )
    return raw


@pytest.mark.parametrize("cls", [data.MNIST, data.FashionMNIST])
def test_mnist(tmp_path, few, cls):
    raw = write_idx(tmp_path, cls.__name__)
    mnist = ready(cls, tmp_path, image_size=32, limit=60)
    images, labels = first(mnist.test_dataloader())
    assert images.shape == (50, 1, 32, 32) and labels.dtype == torch.int64
    assert len(mnist.train_set) == len(mnist.test_set) == 60
    assert [*Counter(mnist.test_set.labels).values()] == [6] * 10
    assert -1 <= images.min() < images.max() <= 1

    cut(raw / "train-images-idx3-ubyte")
    message = r"train-images-idx3-ubyte is damaged: it has 235208 bytes and should have 470416"
    with pytest.raises(
        RuntimeError,
        match=message + ".*; put a whole one in its place, or move it away .*dataset.download=true",
    ):
        ready(cls, tmp_path)
    (raw / "t10k-labels-idx1-ubyte").unlink()
    message = rf"no {cls.__name__} at dataset\.root=.*lacks t10k-labels-idx1-ubyte;.*download=true"
    with pytest.raises(FileNotFoundError, match=message):
        ready(cls, tmp_path)


def test_mnist_is_asked_for_in_its_true_size(tmp_path):
    write_idx(tmp_path)
    with pytest.raises(RuntimeError, match=r"has 470416 bytes and should have 47040016"):
        ready(data.MNIST, tmp_path)


def test_mnist_whose_header_is_wrong(tmp_path, few):
    images = write_idx(tmp_path) / "t10k-images-idx3-ubyte"
    images.write_bytes(b"\0" * images.stat().st_size)
    with pytest.raises(RuntimeError, match=r"MNIST.raw is damaged: .*move it away") as info:
        ready(data.MNIST, tmp_path)
    assert info.value.__cause__ is not None


def test_download(tmp_path, few, monkeypatch):
    calls = []

    def download(self):
        calls.append(self.root)
        assert is_locked(tmp_path / "new")
        write_idx(tmp_path / "new")

    monkeypatch.setattr(datasets.MNIST, "download", download)
    assert len(ready(data.MNIST, tmp_path / "new", download=True, limit=5).train_set) == 5
    assert len(calls) == 1
    ready(data.MNIST, tmp_path / "new", download=True, limit=5)
    assert len(calls) == 1  # it is there


def test_no_internet(tmp_path, monkeypatch):
    def download(self):
        raise URLError("unreachable")

    for cls, source in ((data.CIFAR10, datasets.CIFAR10), (data.CelebA, datasets.CelebA)):
        monkeypatch.setattr(source, "download", download)
        message = rf"{cls.__name__} cannot be downloaded .*unreachable.*into {tmp_path}.* by hand"
        with pytest.raises(RuntimeError, match=message) as info:
            ready(cls, tmp_path, channels=3, download=True)
        assert isinstance(info.value.__cause__, URLError)


# CIFAR10


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Four images a file, with checksums to match."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    md5 = {}
    for name in data.CIFAR10.MD5:
        content = {"label_names": list("abcdefghij")}
        if not name.endswith("meta"):
            pixels = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
            content = {"data": pixels, "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = calculate_md5(folder / name)
    source = datasets.CIFAR10
    monkeypatch.setattr(data.CIFAR10, "MD5", md5)
    monkeypatch.setattr(source, "train_list", [(n, md5[n]) for n, _ in source.train_list])
    monkeypatch.setattr(source, "test_list", [(n, md5[n]) for n, _ in source.test_list])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5[source.meta["filename"]]})
    return folder


def test_cifar10(cifar10):
    module = ready(data.CIFAR10, cifar10.parent, channels=3, image_size=32, augment="crop_flip")
    assert len(module.train_set) == 20 and len(module.test_set) == 4
    images, labels = first(module.test_dataloader())
    pixels = pickle.loads((cifar10 / "test_batch").read_bytes())["data"]
    assert images.min() >= -1 and images.max() <= 1
    found = ((images + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(found, torch.tensor(pixels).view(4, 3, 32, 32))
    assert labels.tolist() == [0, 1, 2, 9]
    assert first(module.train_dataloader())[0].shape == (20, 3, 32, 32)

    cut(cifar10 / "data_batch_3")
    with pytest.raises(RuntimeError, match=r"data_batch_3 is damaged: its MD5 is .*move it away"):
        ready(data.CIFAR10, cifar10.parent)
    shutil.rmtree(cifar10)
    with pytest.raises(FileNotFoundError, match=r"no CIFAR10 at dataset\.root=.*data_batch_1"):
        ready(data.CIFAR10, cifar10.parent)
