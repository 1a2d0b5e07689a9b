"""Event data made up in their own formats on disk: what they give and refuse."""

import shutil
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sj_taid import data
from sj_taid.data import event
from sj_taid.training.config import compose
from sj_taid.training.train import train
from tests.data.made_up import cut, first, is_locked, ready
from tests.training.conftest import TINY_CLASSIFICATION

T = 4
EVENTS = {"channels": 2, "image_size": 34, "T": T}
FRAMES = f"frames_number_{T}_split_by_number"


@pytest.fixture
def unpacked(tmp_path):
    """A part of N-MNIST: three digits of 40 events each."""
    for path in ("Train/0", "Train/7", "Test/3"):
        (tmp_path / path).mkdir(parents=True)
        # x = 30, y = 2, brighter, at 0, 1, 2, ... microseconds
        events = b"".join(struct.pack(">BBBH", 30, 2, 128, t) for t in range(40))
        (tmp_path / path / "00001.bin").write_bytes(events)
    return tmp_path


@pytest.fixture
def nmnist(unpacked):
    """The same in two archives, which are not the published ones."""
    (unpacked / "download").mkdir()
    for name in ("Train", "Test"):
        with zipfile.ZipFile(unpacked / "download" / f"{name}.zip", "w") as archive:
            for path in (unpacked / name).rglob("*.bin"):
                archive.write(path, path.relative_to(unpacked))
        shutil.rmtree(unpacked / name)
    return unpacked


@pytest.mark.parametrize("layout", ["unpacked", "nmnist"])
def test_nmnist_part(layout, request, caplog):
    root = request.getfixturevalue(layout)
    recordings = {path for path in root.rglob("*") if path.is_file()}
    module = ready(data.NMNIST, root, **EVENTS)
    frames, labels = first(module.train_dataloader())
    assert frames.shape == (2, T, 2, 34, 34) and frames.dtype == torch.float32
    assert sorted(labels.tolist()) == [0, 7] and module.test_set.labels == [3]
    assert (frames[:, :, 1, 2, 30] == 40 / T).all() and frames.sum() == 2 * 40
    assert "has 2 training and 1 test samples, not the published 60000" in caplog.text
    # What was given is left as it is, and what was needed for the conversion alone is gone.
    assert all(path.is_file() for path in recordings)
    made = {root / name for name in ("events_np", FRAMES, ".lock")}
    assert {*root.iterdir()} - made <= {path for file in recordings for path in file.parents}

    smaller = ready(data.NMNIST, root, **EVENTS | {"image_size": 17}, augment="crop_flip")
    assert first(smaller.train_dataloader())[0].shape == (2, T, 2, 17, 17)
    for path in {*root.iterdir()} - made:  # needed once only
        shutil.rmtree(path)
    assert len(ready(data.NMNIST, root, **EVENTS | {"T": 3}).test_set) == 1


def test_nmnist_frames_equal_those_of_spikingjelly(nmnist, monkeypatch):
    """So fingerprints of recordings, and what is cached by them, hold for either's frames."""
    ready(data.NMNIST, nmnist, **EVENTS)
    ours = {path: path.read_bytes() for path in (nmnist / FRAMES).rglob("*.npz")}
    shutil.rmtree(nmnist / FRAMES)
    options = {"data_type": "frame", "frames_number": T, "split_by": "number"}
    event._datasets().NMNIST(nmnist, train=True, **options)
    assert ours == {path: path.read_bytes() for path in (nmnist / FRAMES).rglob("*.npz")}


def test_train_starts_calibrated_on_the_time_steps_of_recordings(nmnist, caplog):
    caplog.set_level("INFO", "sj_taid")
    tiny = [o for o in TINY_CLASSIFICATION if not o.startswith("model.T=")]
    data = [f"root={nmnist}", "T=3", "batch_size=2", "validation=0.5"]
    chosen = ["dataset=nmnist", *(f"dataset.{option}" for option in data)]
    train(compose("train", [*tiny, *chosen, "neuron_start.calibrate=0.2"]), nmnist / "run")
    # Time by mistake in place of the two samples would ask the model for two steps.
    (report,) = (m for m in caplog.messages if "rate" in m and "threshold" in m)
    assert "does not run" not in report and "0.2" in report


def test_nmnist_refuses_missing_recordings(nmnist):
    (nmnist / "download" / "Test.zip").unlink()
    expected = r"no NMNIST at dataset\.root=.*expected events_np or Train or download with "
    for root, names in ((nmnist, r"Test\.zip"), (nmnist / "nowhere", r"Train\.zip, Test\.zip")):
        with pytest.raises(FileNotFoundError, match=f"{expected}{names}; fetch them from https://"):
            ready(data.NMNIST, root, **EVENTS)
    assert not (nmnist / "nowhere").exists()


def test_nmnist_refuses_damaged_recordings(nmnist):
    archive = nmnist / "download" / "Test.zip"
    whole = archive.read_bytes()
    cut(archive)
    with pytest.raises(RuntimeError, match=r"cannot be made into frames \(BadZipFile") as info:
        ready(data.NMNIST, nmnist, **EVENTS)
    assert "delete" not in str(info.value) and archive.is_file()
    archive.write_bytes(whole)
    module = ready(data.NMNIST, nmnist, **EVENTS)
    frames = nmnist / FRAMES
    cut(next((frames / "test").rglob("*.npz")))
    with pytest.raises(RuntimeError, match=rf"00001\.npz cannot be read .*; move {frames} away"):
        first(module.test_dataloader())
    shutil.rmtree(frames)
    cut(next((nmnist / "events_np" / "test").rglob("*.npz")))
    with pytest.raises(RuntimeError, match=r"events_np/test/3/00001\.npz cannot be read"):
        ready(data.NMNIST, nmnist, **EVENTS)


def test_nmnist_refuses_other_classes_and_an_empty_test_set(unpacked):
    (unpacked / "Test" / "3").rename(unpacked / "Test" / "three")
    with pytest.raises(ValueError, match=r"the classes 0, 1, .* 9, but it holds three; move"):
        ready(data.NMNIST, unpacked, **EVENTS)
    shutil.rmtree(unpacked / FRAMES / "test")
    with pytest.raises(RuntimeError, match="has 2 training and 0 test recordings of NMNIST"):
        ready(data.NMNIST, unpacked, **EVENTS)


@pytest.mark.parametrize("step", ["events", "frames"])
def test_nmnist_starts_over_after_an_interrupted_preparation(nmnist, monkeypatch, step):
    def interrupt(*arguments, **options):
        assert is_locked(nmnist)
        raise KeyboardInterrupt

    source = event._datasets().NMNIST
    steps = {"events": (source, "create_raw_from_extracted"), "frames": (np, "load")}
    with monkeypatch.context() as context, pytest.raises(KeyboardInterrupt):
        context.setattr(*steps[step], interrupt)
        ready(data.NMNIST, nmnist, **EVENTS)
    assert not (nmnist / FRAMES).exists()
    assert len(ready(data.NMNIST, nmnist, **EVENTS).train_set) == 2


def write_events(folder, n):
    folder.mkdir(parents=True)
    for i in range(n):
        events = {key: np.zeros(8, dtype=np.int64) for key in "xyp"}
        np.savez(folder / f"{folder.name}_{i}.npz", t=np.arange(8), **events)


def test_cifar10_dvs_tests_on_the_last_tenth_of_each_class(tmp_path):
    for name in ("airplane", "truck"):
        write_events(tmp_path / "events_np" / name, 10)
    module = ready(data.CIFAR10DVS, tmp_path, **EVENTS | {"image_size": 128})
    names = [Path(path).name for path in module.test_set.paths]
    assert names == ["airplane_9.npz", "truck_9.npz"]
    assert module.test_set.labels == [0, 9] and module.train_set.labels == [0] * 9 + [9] * 9
    assert first(module.test_dataloader())[0].shape == (2, T, 2, 128, 128)

    message = r"download with .*truck\.zip; add dataset\.download=true"
    with pytest.raises(FileNotFoundError, match=message):
        ready(data.CIFAR10DVS, tmp_path / "nowhere", **EVENTS)


def test_cifar10_dvs_fetches_missing_archives_alone(tmp_path, monkeypatch):
    source, fetched = event._datasets().CIFAR10DVS, []
    names = [name for name, _, _ in source.resource_url_md5()]
    (tmp_path / "download").mkdir()
    (tmp_path / "download" / names[0]).write_bytes(b"of one's own")

    def fetch(url, root, filename, md5):
        fetched.append(filename)
        if len(fetched) == 2:
            raise OSError("no route to host")
        (root / filename).write_bytes(b"fetched")

    monkeypatch.setattr(event, "download_url", fetch)
    message = r"cannot be made into frames \(OSError: no route to host\)"
    with pytest.raises(RuntimeError, match=message):
        ready(data.CIFAR10DVS, tmp_path, download=True, **EVENTS)
    assert [path.name for path in (tmp_path / "download").iterdir()] == names[:2]

    def convert(unpacked, events):
        write_events(events / "cat", 10)

    monkeypatch.setattr(source, "extract_downloaded_files", lambda *_: None)
    monkeypatch.setattr(source, "create_raw_from_extracted", convert)
    assert len(ready(data.CIFAR10DVS, tmp_path, download=True, **EVENTS).test_set) == 1
    assert fetched == [names[1], *names[2:3], *names[2:]]
    assert (tmp_path / "download" / names[0]).read_bytes() == b"of one's own"


def test_dvs128_gesture(tmp_path):
    for part, n in (("train", 2), ("test", 1)):
        for gesture in range(11):
            write_events(tmp_path / "events_np" / part / str(gesture), n)
    module = ready(data.DVS128Gesture, tmp_path, classes=11, **EVENTS | {"image_size": 32})
    assert first(module.train_dataloader())[0].shape == (22, T, 2, 32, 32)
    assert sorted(module.test_set.labels) == list(range(11))
    assert module.class_names[module.test_set.labels[2]] == "10"
