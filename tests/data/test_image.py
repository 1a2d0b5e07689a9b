"""Images in memory, made up in their own formats on disk: what they give and refuse."""

import pickle
import shutil
import struct
from collections import Counter
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from sj_taid import data
from tests.data.made_up import cut, first, is_locked, ready

DAMAGED = r"is missing or damaged \(.*\); move it away, .*=true"


def test_digits():
    digits = ready(data.Digits)
    assert len(digits.train_set) == 1438
    images, labels = (torch.cat(parts) for parts in zip(*digits.test_dataloader(), strict=True))
    assert images.shape == (359, 1, 16, 16) and images.min() == -1 and images.max() == 1
    assert set(labels.tolist()) == set(range(10))


@pytest.mark.parametrize("source", ["SVHN", "EMNIST", "USPS", "CelebA", "mnist", "typo"])
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


@pytest.mark.parametrize("source", ["MNIST", "FashionMNIST"])
def test_mnist(tmp_path, source):
    raw = write_idx(tmp_path, source)
    options = {"source": source, "image_size": 32, "limit": 60}
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
    message = rf"no {source} at dataset\.root=.*holds {source}/raw, or .*download=true"
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


@pytest.mark.parametrize("name", ["CIFAR10", "CelebA"])
def test_download_without_internet(tmp_path, monkeypatch, name):
    def download(self):
        raise URLError("unreachable")

    monkeypatch.setattr(getattr(datasets, name), "download", download)
    kind = data.CelebA if name == "CelebA" else data.Torchvision
    with pytest.raises(OSError, match=rf"{name} in .*unreachable") as info:
        ready(kind, tmp_path, source=name, channels=3, download=True)
    assert isinstance(info.value.__cause__, URLError)


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Four images in each file, with checksums to match."""
    source, folder, md5 = datasets.CIFAR10, tmp_path / "cifar-10-batches-py", {}
    folder.mkdir()
    generator = np.random.default_rng(0)
    names = dict([*source.train_list, *source.test_list])
    for name in (*names, source.meta["filename"]):
        content = {"label_names": list("abcdefghij")}
        if not name.endswith("meta"):
            pixels = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
            content = {"data": pixels, "labels": [0, 1, 2, 9]}
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = calculate_md5(folder / name)
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(source, part, [(n, md5[n]) for n, _ in getattr(source, part)])
    monkeypatch.setattr(source, "meta", source.meta | {"md5": md5[source.meta["filename"]]})
    return folder


def test_cifar10(cifar10):
    options = {"source": "CIFAR10", "channels": 3, "image_size": 32}
    module = ready(data.Torchvision, cifar10.parent, **options, augment="crop_flip")
    assert len(module.train_set) == 20 and len(module.test_set) == 4
    images, labels = first(module.test_dataloader())
    pixels = pickle.loads((cifar10 / "test_batch").read_bytes())["data"]
    assert images.min() >= -1 and images.max() <= 1
    found = ((images + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(found, torch.tensor(pixels).view(4, 3, 32, 32))
    assert labels.tolist() == [0, 1, 2, 9] and module.class_names[9] == "j"
    assert first(module.train_dataloader())[0].shape == (20, 3, 32, 32)

    cut(cifar10 / "data_batch_3")
    with pytest.raises(OSError, match=DAMAGED):
        ready(data.Torchvision, cifar10.parent, **options)
