"""Event data made up in their own formats on disk: what they give and refuse."""

import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets.utils import calculate_md5

from sj_taid import data
from sj_taid.data import event
from sj_taid.training.config import compose
from sj_taid.training.train import train
from tests.data.made_up import cut, first, is_locked, ready
from tests.training.conftest import TINY_CLASSIFICATION

T = 4
EVENTS = {"source": "NMNIST", "channels": 2, "image_size": 34, "T": T, "name": "nmnist"}
FRAMES = f"frames_number_{T}_split_by_number"
NMNIST = event.load_source("spikingjelly.datasets.n_mnist:NMNIST")


@pytest.fixture
def nmnist(tmp_path, monkeypatch):
    """Two archives of three digits of 40 events each, with checksums to match."""
    archives, resources = tmp_path / "download", []
    archives.mkdir()
    # x = 30, y = 2, brighter, at 0, 1, 2, ... microseconds
    events = b"".join(struct.pack(">BBBH", 30, 2, 128, t) for t in range(40))
    for part, digits in (("Train", "07"), ("Test", "3")):
        path = archives / f"{part}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for digit in digits:
                archive.writestr(f"{part}/{digit}/00001.bin", events)
        resources.append((path.name, f"https://there/{path.name}", calculate_md5(path)))
    monkeypatch.setattr(NMNIST, "resource_url_md5", staticmethod(lambda: resources))
    return tmp_path


def test_nmnist(nmnist, caplog):
    module = ready(data.Recordings, nmnist, **EVENTS)
    frames, labels = first(module.train_dataloader())
    assert frames.shape == (2, T, 2, 34, 34) and frames.dtype == torch.float32
    assert sorted(labels.tolist()) == [0, 7] and module.test_set.labels == [3]
    assert (frames[:, :, 1, 2, 30] == 40 / T).all() and frames.sum() == 2 * 40
    assert "has 2 training and 1 test samples, not the published 60000" in caplog.text
    assert {path.name for path in nmnist.iterdir()} == {"download", "events_np", FRAMES, ".lock"}
    assert len([*(nmnist / "download").iterdir()]) == 2

    shutil.rmtree(nmnist / "download")  # the recordings will do
    smaller = {"image_size": 17, "augment": "crop_flip", "T": 3}
    module = ready(data.Recordings, nmnist, **EVENTS | smaller)
    assert first(module.train_dataloader())[0].shape == (2, 3, 2, 17, 17)


def test_train_starts_calibrated_on_the_time_steps_of_recordings(nmnist, caplog):
    caplog.set_level("INFO", "sj_taid")
    tiny = [o for o in TINY_CLASSIFICATION if not o.startswith("model.T=")]
    options = [f"root={nmnist}", "T=3", "batch_size=2", "validation=0.5", "num_workers=0"]
    chosen = ["dataset=nmnist", *(f"dataset.{option}" for option in options)]
    train(compose("train", [*tiny, *chosen, "neuron_start.calibrate=0.2"]), nmnist / "run")
    # Time by mistake in place of the two samples would ask the model for two steps.
    (report,) = (m for m in caplog.messages if "rate" in m and "threshold" in m)
    assert "does not run" not in report and "0.2" in report


def test_nmnist_refuses_a_damaged_archive_and_leaves_it(nmnist):
    archive = nmnist / "download" / "Test.zip"
    cut(archive)
    with pytest.raises(FileNotFoundError, match=r"download with Test\.zip from https://there/Test"):
        ready(data.Recordings, nmnist, **EVENTS)
    assert archive.exists()


def test_nmnist_refuses_damaged_frames_and_recordings(nmnist):
    module = ready(data.Recordings, nmnist, **EVENTS)
    frames, tested = nmnist / FRAMES, nmnist / FRAMES / "test"
    cut(next(tested.rglob("*.npz")))
    with pytest.raises(OSError, match=rf"00001\.npz cannot be read .*; move {frames} away"):
        first(module.test_dataloader())
    other = r"test has the classes {}, .* NMNIST are 0, .*; move"
    (tested / "3").rename(tested / "three")
    with pytest.raises(OSError, match=other.format("three")):
        ready(data.Recordings, nmnist, **EVENTS)
    shutil.rmtree(tested)
    with pytest.raises(OSError, match=other.format("of no recording")):
        ready(data.Recordings, nmnist, **EVENTS)
    shutil.rmtree(frames)
    cut(nmnist / "events_np" / "test" / "3" / "00001.npz")
    with pytest.raises(OSError, match="cannot make frames"):
        ready(data.Recordings, nmnist, **EVENTS)
    assert not frames.exists()


def test_nmnist_starts_over_after_an_interrupted_preparation(nmnist, monkeypatch):
    def interrupt(*arguments, **options):
        assert is_locked(nmnist)
        raise KeyboardInterrupt

    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(np, "load", interrupt)
        ready(data.Recordings, nmnist, **EVENTS)
    assert {path.name for path in nmnist.iterdir()} == {"download", ".lock"}
    assert len(ready(data.Recordings, nmnist, **EVENTS).train_set) == 2


def write_events(folder, n):
    folder.mkdir(parents=True)
    for i in range(n):
        events = {key: np.zeros(8, dtype=np.int64) for key in "xyp"}
        np.savez(folder / f"{folder.name}_{i}.npz", t=np.arange(8), **events)


def test_cifar10_dvs_tests_on_the_last_tenth_of_each_class(tmp_path):
    for name in ("airplane", "truck"):
        write_events(tmp_path / "events_np" / name, 10)
    options = EVENTS | {"source": "CIFAR10DVS", "image_size": 128}
    module = ready(data.Recordings, tmp_path, **options)
    names = [Path(path).name for path in module.test_set.samples]
    assert names == ["airplane_9.npz", "truck_9.npz"]
    assert module.test_set.labels == [0, 9] and module.train_set.labels == [0] * 9 + [9] * 9
    assert first(module.test_dataloader())[0].shape == (2, T, 2, 128, 128)


def test_cifar10_dvs_keeps_what_it_downloads(tmp_path, monkeypatch):
    def download_url(url, root, filename, md5):
        if len([*root.iterdir()]) == 2:
            raise OSError("no route to host")
        (root / filename).write_bytes(b"fetched")

    monkeypatch.setattr("spikingjelly.datasets.base.download_url", download_url)
    with pytest.raises(OSError, match=r"cannot make frames .*no route to host"):
        ready(data.Recordings, tmp_path, download=True, **EVENTS | {"source": "CIFAR10DVS"})
    assert len([*(tmp_path / "download").iterdir()]) == 2


def test_dvs128_gesture_has_its_classes_in_the_order_of_their_names(tmp_path):
    for part in ("train", "test"):
        for gesture in ("2", "10"):
            write_events(tmp_path / "events_np" / part / gesture, 1)
    options = EVENTS | {"source": "DVS128Gesture", "image_size": 32, "classes": 11}
    module = ready(data.Recordings, tmp_path, **options)
    assert first(module.train_dataloader())[0].shape == (2, T, 2, 32, 32)
    assert sorted(module.test_set.labels) == [2, 3] and module.class_names[2:4] == ["10", "2"]
