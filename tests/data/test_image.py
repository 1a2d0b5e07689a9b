"""The data sets: what they give, and what they say when files are missing or damaged.

Each is made up in its own format on disk; nothing is downloaded.
"""

import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from filelock import FileLock, Timeout
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5

from sj_taid import data
from sj_taid.data import event
from sj_taid.data.base import LOCK
from tests.training.conftest import CONF, write_images


def make(cls, root=None, **options):
    shared = {"name": "test", "channels": 1, "image_size": 16, "batch_size": 50, "classes": 10}
    return cls(**shared | ({} if root is None else {"root": str(root)}) | options)


def ready(*arguments, **options):
    module = make(*arguments, **options)
    module.prepare_data()
    module.setup()
    return module


def first(loader):
    return next(iter(loader))


def cut(path, share=0.5):
    """What a download that was killed leaves."""
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])


def is_locked(folder):
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "dataset").glob("*.yaml")))
def test_every_config_makes_its_data_module(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(f"dataset/{name}").dataset
    module = instantiate(cfg)
    assert module.name == name
    for key in ("channels", "image_size", "classes", "batch_size", "num_workers", "augment"):
        assert getattr(module, key) == cfg[key]
    assert not isinstance(module, event.EventData) or cfg["T"] == module.T


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


def test_limit_spreads_over_the_set():
    whole, some = ready(data.Digits), ready(data.Digits, limit=100)
    assert len(some.train_set) == len(some.test_set) == 100
    assert torch.equal(some.train_set[99][0], whole.train_set[1438 * 99 // 100][0])
    assert len(ready(data.Digits, limit=1000).test_set) == 359
    with pytest.raises(ValueError, match=r"dataset\.limit must be null or at least 1.* 0"):
        make(data.Digits, limit=0)


def test_fingerprint_is_that_of_the_samples(tmp_path):
    fingerprint = ready(data.Digits).fingerprint()
    assert fingerprint == ready(data.Digits, batch_size=7, augment="affine").fingerprint()
    others = [{"limit": 100}, {"image_size": 8}]
    assert len({fingerprint, *(ready(data.Digits, **o).fingerprint() for o in others)}) == 3

    write_images(tmp_path, 20)
    before = ready(data.ImageFolder, tmp_path, classes=None).fingerprint()
    assert before == ready(data.ImageFolder, tmp_path, classes=None).fingerprint()
    (tmp_path / "00.png").unlink()
    assert before != ready(data.ImageFolder, tmp_path, classes=None).fingerprint()


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
    assert labels.tolist() == [i * 100 // 60 % 10 for i in range(50)]
    assert len(mnist.train_set) == 60
    assert -1 <= images.min() < images.max() <= 1

    cut(raw / "train-images-idx3-ubyte")
    message = r"train-images-idx3-ubyte is damaged: it has 235208 bytes and should have 470416"
    with pytest.raises(RuntimeError, match=message + ".*delete it .*dataset.download=true"):
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
    with pytest.raises(RuntimeError, match=r"MNIST.raw is damaged: .*delete it") as info:
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
    with pytest.raises(RuntimeError, match=r"data_batch_3 is damaged: its MD5 is .*delete it"):
        ready(data.CIFAR10, cifar10.parent)
    shutil.rmtree(cifar10)
    with pytest.raises(FileNotFoundError, match=r"no CIFAR10 at dataset\.root=.*data_batch_1"):
        ready(data.CIFAR10, cifar10.parent)


# Folders of images


def test_folder_without_labels(tmp_path):
    write_images(tmp_path, 20)
    (tmp_path / "notes.txt").write_text("not an image")
    module = ready(data.ImageFolder, tmp_path, channels=3, classes=None, num_workers=2)
    assert module.classes is None
    assert len(module.train_set) == 18 and len(module.test_set) == 2
    images, labels = first(module.test_dataloader())
    assert images.shape == (2, 3, 16, 16) and labels.tolist() == [-1, -1]
    assert ((images[:, 0, 8, 8] + 1) * 127.5).round().tolist() == [18, 19]


def test_folder_with_a_folder_for_each_class(tmp_path):
    for name, n in (("cat", 10), ("dog", 20), (".thumbnails", 3)):
        write_images(tmp_path / "train" / name, n)
        write_images(tmp_path / "test" / name, 2, mode="L", suffix="jpg")
    module = ready(data.ImageFolder, tmp_path / "train", classes=2)
    images, labels = first(module.test_dataloader())
    assert labels.tolist() == [0, 1, 1] and len(module.train_set) == 27
    assert images.shape == (3, 1, 16, 16)

    apart = {"root": tmp_path / "train", "test_root": str(tmp_path / "test")}
    module = ready(data.ImageFolder, **apart, classes=None)
    assert module.classes == 2
    assert len(module.train_set) == 30 and len(module.test_set) == 4

    with pytest.raises(ValueError, match=r"classes=10, but .*2 folders .*cat, dog.*classes=2"):
        ready(data.ImageFolder, tmp_path / "train")
    shutil.rmtree(tmp_path / "test" / "dog")
    with pytest.raises(ValueError, match=r"test_root=.*must hold.*\(cat, dog\), but holds cat"):
        ready(data.ImageFolder, **apart, classes=2)


def test_folder_that_is_no_use(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder at dataset\.root=.*nowhere"):
        ready(data.ImageFolder, tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no image in .*\.png"):
        ready(data.ImageFolder, tmp_path, classes=None)
    write_images(tmp_path, 4)
    for share in (0.1, 1.5):
        message = rf"test_share={share} of the 4 images in .* leaves .*; choose another share"
        with pytest.raises(ValueError, match=message):
            ready(data.ImageFolder, tmp_path, classes=None, test_share=share)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for suffix in ("jpg", "png"):
        Image.fromarray(noise).save(tmp_path / f"a.{suffix}")
        cut(tmp_path / f"a.{suffix}")
        write_images(tmp_path, 9)
        module = ready(data.ImageFolder, tmp_path, classes=None)
        message = rf"a\.{suffix} cannot be read \(OSError: .*\); delete or replace it"
        with pytest.raises(RuntimeError, match=message):
            first(module.train_dataloader()), first(module.test_dataloader())
        (tmp_path / f"a.{suffix}").unlink()


# CelebA


@pytest.fixture
def celeba(tmp_path, monkeypatch):
    """Eight images, black in the middle 148x148 and white around it, and the partition."""
    folder = tmp_path / "celeba"
    images = folder / "img_align_celeba"
    images.mkdir(parents=True)
    face = np.full((218, 178, 3), 255, dtype=np.uint8)
    face[35:183, 15:163] = 0
    lines = []
    for i, part in enumerate([0, 0, 0, 0, 1, 2, 2, 2], start=1):
        Image.fromarray(face).save(images / f"{i:06}.jpg", quality=95)
        lines.append(f"{i:06}.jpg {part}\n")
    partition = folder / "list_eval_partition.txt"
    partition.write_text("".join(lines))
    files = [("id", calculate_md5(partition), partition.name)]
    monkeypatch.setattr(datasets.CelebA, "file_list", files)
    return folder


def test_celeba(celeba):
    module = ready(data.CelebA, celeba.parent, channels=3, image_size=64, classes=None)
    assert len(module.train_set) == 4 and len(module.test_set) == 3
    images, labels = first(module.train_dataloader())
    assert images.shape == (4, 3, 64, 64) and labels.tolist() == [-1] * 4
    assert images[:, :, 2:-2, 2:-2].max() < -0.95  # all but what JPEG blurs

    damaged = celeba / "img_align_celeba" / "000006.jpg"
    cut(damaged)
    with pytest.raises(RuntimeError, match=r"000006\.jpg cannot be read .*delete .*img_align"):
        first(module.test_dataloader())
    damaged.unlink()
    with pytest.raises(RuntimeError, match=r"img_align_celeba is damaged.*1 of 8 .*000006\.jpg"):
        ready(data.CelebA, celeba.parent)
    cut(celeba / "list_eval_partition.txt")
    with pytest.raises(RuntimeError, match=r"list_eval_partition\.txt is damaged: its MD5 is"):
        ready(data.CelebA, celeba.parent)
    shutil.rmtree(celeba / "img_align_celeba")
    with pytest.raises(FileNotFoundError, match=r"no CelebA .*lacks img_align_celeba;"):
        ready(data.CelebA, celeba.parent)


# Event cameras

T = 4
EVENTS = {"channels": 2, "image_size": 34, "T": T}


@pytest.fixture
def nmnist(tmp_path, monkeypatch):
    """Three digits of 40 events each, in two archives with checksums to match."""
    source = event._datasets().NMNIST
    download = tmp_path / "download"
    download.mkdir()
    resources = []
    for name, digits in (("Train", (0, 7)), ("Test", (3,))):
        with zipfile.ZipFile(download / f"{name}.zip", "w") as archive:
            for digit in digits:
                # x = 30, y = 2, brighter, at 0, 1, 2, ... microseconds
                events = b"".join(struct.pack(">BBBH", 30, 2, 128, t) for t in range(40))
                archive.writestr(f"{name}/{digit}/00001.bin", events)
        md5 = calculate_md5(download / f"{name}.zip")
        resources.append((f"{name}.zip", "https://digits.example", md5))
    monkeypatch.setattr(source, "resource_url_md5", lambda: resources)
    monkeypatch.setattr(data.NMNIST, "counts", (2, 1))
    return tmp_path


def test_nmnist(nmnist):
    module = ready(data.NMNIST, nmnist, **EVENTS)
    frames, labels = first(module.train_dataloader())
    assert frames.shape == (2, T, 2, 34, 34) and frames.dtype == torch.float32
    assert sorted(labels.tolist()) == [0, 1]  # of the two folders there are
    assert (frames[:, :, 1, 2, 30] == 40 / T).all() and frames.sum() == 2 * 40

    smaller = ready(data.NMNIST, nmnist, **EVENTS | {"image_size": 17}, augment="crop_flip")
    assert first(smaller.train_dataloader())[0].shape == (2, T, 2, 17, 17)

    shutil.rmtree(nmnist / "download")  # needed once only
    assert len(ready(data.NMNIST, nmnist, **EVENTS).test_set) == 1


def test_nmnist_missing_or_half_downloaded(nmnist):
    cut(nmnist / "download" / "Test.zip")
    message = (
        r"no NMNIST at dataset\.root=.*expected .*events_np .*but Test\.zip are missing or "
        r"damaged there; fetch them from https://digits\.example"
    )
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=message):
            ready(data.NMNIST, nmnist, **EVENTS)
        assert (nmnist / "download" / "Test.zip").is_file()
    with pytest.raises(FileNotFoundError, match=r"Train\.zip, Test\.zip are missing"):
        ready(data.NMNIST, nmnist / "nowhere", **EVENTS)


def test_events_whose_preparation_was_killed(nmnist, monkeypatch):
    def killed(*arguments):
        assert is_locked(nmnist)
        raise KeyboardInterrupt

    source = event._datasets().NMNIST
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(source, "create_raw_from_extracted", killed)
        ready(data.NMNIST, nmnist, **EVENTS)
    with pytest.raises(RuntimeError, match=r"cannot be made into frames .*delete everything in"):
        ready(data.NMNIST, nmnist, **EVENTS)
    for path in nmnist.iterdir():
        if path.name != "download":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    ready(data.NMNIST, nmnist, **EVENTS)

    monkeypatch.setattr(data.NMNIST, "counts", (3, 1))
    with pytest.raises(RuntimeError, match=r"has 2 recordings for training and 1 .*of 3 and 1;"):
        ready(data.NMNIST, nmnist, **EVENTS)


def test_a_frame_file_that_cannot_be_read_is_named(nmnist):
    module = ready(data.NMNIST, nmnist, **EVENTS)
    cut(next((nmnist / f"frames_number_{T}_split_by_number" / "test").rglob("*.npz")))
    message = r"00001\.npz cannot be read .*; delete everything in .* but its folder download"
    with pytest.raises(RuntimeError, match=message):
        first(module.test_dataloader())


def write_events(folder, n):
    folder.mkdir(parents=True)
    for i in range(n):
        events = {key: np.zeros(8, dtype=np.int64) for key in "xyp"}
        np.savez(folder / f"{folder.name}_{i}.npz", t=np.arange(8), **events)


def test_cifar10_dvs_tests_on_the_last_tenth_of_each_class(tmp_path, monkeypatch):
    for name in ("airplane", "truck"):
        write_events(tmp_path / "events_np" / name, 10)
    monkeypatch.setattr(data.CIFAR10DVS, "counts", (18, 2))
    module = ready(data.CIFAR10DVS, tmp_path, **EVENTS | {"image_size": 128})
    names = [Path(path).name for path in module.test_set.paths]
    assert names == ["airplane_9.npz", "truck_9.npz"]
    assert module.test_set.labels == [0, 1] and module.train_set.labels == [0] * 9 + [1] * 9
    assert first(module.test_dataloader())[0].shape == (2, T, 2, 128, 128)

    with pytest.raises(FileNotFoundError, match=r"truck\.zip are missing.*dataset\.download=true"):
        ready(data.CIFAR10DVS, tmp_path / "nowhere", **EVENTS)


def test_dvs128_gesture(tmp_path, monkeypatch):
    for part, n in (("train", 2), ("test", 1)):
        for gesture in range(11):
            write_events(tmp_path / "events_np" / part / str(gesture), n)
    monkeypatch.setattr(data.DVS128Gesture, "counts", (22, 11))
    module = ready(data.DVS128Gesture, tmp_path, **EVENTS | {"image_size": 32})
    assert first(module.train_dataloader())[0].shape == (22, T, 2, 32, 32)
    assert sorted(module.test_set.labels) == list(range(11))


def test_too_few_frames(tmp_path):
    with pytest.raises(ValueError, match=r"dataset\.T must be a number of frames >= 1.* 0"):
        make(data.NMNIST, tmp_path, **EVENTS | {"T": 0})
