"""Images in memory, made up in their own formats on disk: what they give and refuse."""

import shutil
import struct
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from sj_taid import data
from tests.data.made_up import cut, first, is_locked, ready

DAMAGED = r"is missing or damaged \(.*\); move it away, .*=true"


def test_digits():
    digits = ready(data.Digits)
    assert len(digits.train_set) == 1438
    images, labels = (torch.cat(parts) for parts in zip(*digits.test_dataloader(), strict=True))
    assert images.shape == (359, 1, 16, 16) and images.min() == -1 and images.max() == 1
    assert set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize("source", ["CelebA", "mnist"])
def test_torchvision_refuses_what_it_cannot_read_by_name(tmp_path, source):
    expected = f"source must be one of MNIST, .*, but it is '{source}'; save its images in folders"
    with pytest.raises(ValueError, match=expected):
        ready(data.Torchvision, root=tmp_path, source=source, download=True)
    assert not list(tmp_path.iterdir())


def write_idx(root, folder="MNIST"):
    """600 training and 100 test images in files of MNIST's format."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for prefix, n in (("train", 600), ("t10k", 100)):
        pixels = (torch.arange(n * 784) % 256).to(torch.uint8)
        labels = (torch.arange(n) % 10).to(torch.uint8)
        images = struct.pack(">IIII", 0x803, n, 28, 28) + pixels.numpy().tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(images)
        classes = struct.pack(">II", 0x801, n) + labels.numpy().tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(classes)
    return raw


def test_fashion_mnist(tmp_path):
    raw = write_idx(tmp_path, "FashionMNIST")
    options = {"source": "FashionMNIST", "image_size": 32, "limit": 60}
    mnist = ready(data.Torchvision, tmp_path, **options)
    images, labels = first(mnist.test_dataloader())
    assert images.shape == (50, 1, 32, 32) and labels.dtype == torch.int64
    assert len(mnist.train_set) == len(mnist.test_set) == 60
    assert [*Counter(mnist.test_set.labels).values()] == [6] * 10
    assert -1 <= images.min() < images.max() <= 1

    for damage in (cut, Path.unlink):
        damage(raw / "train-images-idx3-ubyte")
        with pytest.raises(OSError, match=DAMAGED):
            ready(data.Torchvision, tmp_path, **options)
    shutil.rmtree(raw)
    message = r"no FashionMNIST at dataset\.root=.*holds FashionMNIST/raw, or .*download=true"
    with pytest.raises(FileNotFoundError, match=message):
        ready(data.Torchvision, tmp_path, **options)


def test_mnist_is_downloaded_once(tmp_path, monkeypatch):
    calls = []

    def fetch(url, download_root, **options):
        calls.append(url)
        assert is_locked(tmp_path / "new")
        if len(calls) == 4:
            shutil.rmtree(tmp_path / "new" / "MNIST")
            write_idx(tmp_path / "new")

    monkeypatch.setattr(datasets.mnist, "download_and_extract_archive", fetch)
    for _ in range(2):
        module = ready(data.Torchvision, tmp_path / "new", source="MNIST", download=True, limit=5)
        assert len(module.train_set) == 5 and len(calls) == 4


def test_download_without_internet(tmp_path, monkeypatch):
    def download(self):
        raise URLError("unreachable")

    monkeypatch.setattr(datasets.CelebA, "download", download)
    with pytest.raises(OSError, match=r"CelebA in .*unreachable") as info:
        ready(data.CelebA, tmp_path, channels=3, download=True)
    assert isinstance(info.value.__cause__, URLError)


def test_cifar10(tmp_path, monkeypatch):
    class CIFAR10:
        """As torchvision's: [n, H, W, C]."""

        base_folder, classes = "batches", [*"abcdefghij"]
        data = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
        targets = (0, 1, 2, 9)

        def __init__(self, root, train):
            pass

    monkeypatch.setattr(datasets, "CIFAR10", CIFAR10)
    (tmp_path / "batches").mkdir()
    options = {"source": "CIFAR10", "channels": 3, "image_size": 32, "augment": "crop_flip"}
    module = ready(data.Torchvision, tmp_path, **options)
    images, labels = first(module.test_dataloader())
    found = ((images + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert torch.equal(found, torch.tensor(CIFAR10.data).float())
    assert labels.tolist() == [0, 1, 2, 9] and module.class_names[9] == "j"
    assert first(module.train_dataloader())[0].shape == (4, 3, 32, 32)
