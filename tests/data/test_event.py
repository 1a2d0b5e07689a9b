"""Recordings, made up in their own formats on disk: what they give and refuse."""

import shutil
import struct
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets.utils import calculate_md5

from sj_taid import data
from sj_taid.data import event, progress
from sj_taid.training.commands import train
from sj_taid.training.composing import compose
from tests.data.made_up import cut, first, is_locked, make, ready
from tests.training.conftest import TINY_CLASSIFICATION

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


def test_a_run_on_recordings_starts_calibrated_on_their_time_steps(nmnist, caplog):
    caplog.set_level("INFO", "sj_taid")
    tiny = [o for o in TINY_CLASSIFICATION if not o.startswith("model.T=")]
    chosen = [
        "dataset=nmnist",
        f"dataset.root={nmnist}",
        "dataset.T=3",
        "dataset.batch_size=2",
        "dataset.validation=0.5",
    ]
    cfg = compose("train", [*tiny, *chosen, "neuron_start.calibrate=0.2", "pictures=false"])
    train(cfg, nmnist / "run")
    # Time by mistake in place of the two samples would ask the model for two steps.
    (report,) = (m for m in caplog.messages if "rate" in m and "threshold" in m)
    assert "does not run" not in report and "0.2" in report


def test_the_making_of_frames_says_how_far_it_is(nmnist, monkeypatch, caplog):
    caplog.set_level("INFO", "sj_taid")
    monkeypatch.setattr(progress, "EVERY", 0)
    monkeypatch.setattr(progress, "LOOK", 0.001)
    source = event._datasets().NMNIST
    make_events = source.create_raw_from_extracted

    def slowly(*arguments):
        make_events(*arguments)
        end = time.monotonic() + 10
        while not caplog.messages[-1].endswith("files: 2 of 6") and time.monotonic() < end:
            time.sleep(0.001)

    monkeypatch.setattr(source, "create_raw_from_extracted", staticmethod(slowly))
    ready(data.NMNIST, nmnist, **EVENTS)
    assert caplog.messages[0].startswith("The frames of NMNIST are made once, and kept in ")
    assert "Making frames of NMNIST, files: 2 of 6" in caplog.messages

    caplog.clear()
    ready(data.NMNIST, nmnist, **EVENTS)
    assert not caplog.messages


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
