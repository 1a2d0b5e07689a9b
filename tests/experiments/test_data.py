"""The data sets: what they give, and what they say when files are missing or damaged."""

import struct

import pytest
import torch

from experiments.data import MNIST, Digits

SHARED = {"channels": 1, "image_size": 16, "batch_size": 50, "classes": 10}


def test_digits():
    data = Digits(name="digits", **SHARED)
    data.setup()
    assert len(data.train_set) == 1438 and len(data.test_set) == 359
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (50, 1, 16, 16) and labels.shape == (50,)
    assert data.classes == 10
    everything = torch.cat([x for x, _ in data.test_dataloader()])
    assert everything.min() == -1 and everything.max() == 1
    assert set(data.test_set.tensors[1].tolist()) == set(range(10))
    assert all(len(x) == 50 for x, _ in data.train_dataloader())
    assert sum(len(x) for x, _ in data.test_dataloader()) == 359


def write_idx(root, train_images=60_000, test_images=10_000):
    """Files of MNIST's format and size, with made-up pixels."""
    raw = root / "MNIST" / "raw"
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


def mnist(root, **options):
    return MNIST(root=str(root), name="mnist", **SHARED | {"image_size": 32}, **options)


def test_mnist_from_files(tmp_path):
    write_idx(tmp_path)
    data = mnist(tmp_path, limit=60)
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    assert images.shape == (50, 1, 32, 32)
    assert labels.tolist() == [i % 10 for i in range(50)]
    assert len(data.train_set) == 60
    assert -1 <= images.min() < images.max() <= 1


def test_mnist_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no MNIST at dataset\.root=.*download=true"):
        mnist(tmp_path / "nowhere").setup()


def test_mnist_damaged(tmp_path):
    raw = write_idx(tmp_path)
    images = raw / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:1_000_000])
    with pytest.raises(RuntimeError, match=r"cannot be read.*delete .*MNIST.*download=true"):
        mnist(tmp_path).setup()


def test_mnist_half_a_data_set_never_passes_as_whole(tmp_path):
    write_idx(tmp_path, train_images=30_000)
    with pytest.raises(RuntimeError, match=r"damaged: expected \[60000, 28, 28\].*\[30000"):
        mnist(tmp_path).setup()
