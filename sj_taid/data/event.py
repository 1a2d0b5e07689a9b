"""Recordings of event cameras through SpikingJelly's data sets, as frames of added-up events."""

import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

from .base import LOCK, Data, Files
from .progress import files_followed

log = logging.getLogger(__name__)


class EventData(Data):
    """Frames ``[N, T, 2, H, W]``: how many events of each polarity fell on each pixel.

    SpikingJelly cuts each recording into T pieces with the same number of events. It does so once,
    on the first run, and keeps the frames in ``root``; that takes minutes.

    Args:
        root: the folder that holds ``events_np``, or ``download`` with the files of the source.
        T: frames.
        download: fetch the files, where SpikingJelly can.

    Raises:
        FileNotFoundError: no whole data at ``root`` and none to be had.
        RuntimeError: data that cannot be made into frames, or a frame file that cannot be read.
    """

    source: str  # SpikingJelly's class
    counts: tuple[int, int]  # of recordings for training and for testing

    def __init__(self, root: str, T: int, download: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if T < 1:
            raise ValueError(f"dataset.T must be a number of frames >= 1, but it is {T}")
        self.root = Path(root).expanduser()
        self.T = T
        self.download = download
        self.finish = (v2.Resize([self.image_size] * 2), v2.ToDtype(torch.float32))

    def prepare_data(self) -> None:
        frames = self.root / f"frames_number_{self.T}_split_by_number"  # SpikingJelly's names
        if frames.is_dir() and not frames.with_name(f"{frames.name}.building").exists():
            return
        self._check()
        log.info("The frames of %s are made once, and kept in %s", self.source, frames)
        events = self.root / "events_np"
        total = sum(self.counts) * (1 if events.is_dir() else 2)
        what = f"Making frames of {self.source}, files"
        with FileLock(self.root / LOCK), files_followed([events, frames], what, total):
            self._sets()

    def load(self) -> tuple[Files, Files]:
        self._check()
        train, test = self._sets()
        found = (len(train), len(test))
        if found != self.counts:
            raise RuntimeError(
                f"{self.source} in {self.root} has {found[0]} recordings for training and "
                f"{found[1]} for testing instead of {self.counts[0]} and {self.counts[1]}; "
                + self._remedy
            )
        return train, test

    def _sets(self) -> tuple[Files, Files]:
        return self._files(train=True), self._files(train=False)

    def _files(self, **split: bool) -> Files:
        try:
            frames = self._class(
                self.root, data_type="frame", frames_number=self.T, split_by="number", **split
            )
        except Exception as error:  # whatever SpikingJelly trips over
            raise RuntimeError(
                f"{self.source} in {self.root} cannot be made into frames "
                f"({type(error).__name__}: {error}); {self._remedy}"
            ) from error
        self.class_names = frames.classes
        paths = [path for path, _ in frames.samples]
        return Files(paths, frames.targets, read_frames, self._remedy)

    @property
    def _class(self) -> Any:
        return getattr(_datasets(), self.source)

    @property
    def _remedy(self) -> str:
        return f"delete everything in {self.root} but its folder download, and run again"

    def _check(self) -> None:
        """Refuse what SpikingJelly would delete, or fetch unasked."""
        events, download = self.root / "events_np", self.root / "download"
        if events.is_dir():
            return
        sources = self._class.resource_url_md5()
        lacking = [name for name, _, md5 in sources if not check_integrity(download / name, md5)]
        if not lacking:
            return
        remedy = "add dataset.download=true"
        if self._class.downloadable():
            if self.download:
                self.root.mkdir(parents=True, exist_ok=True)
                return
        else:
            remedy = f"fetch them from {sources[0][1]}, which SpikingJelly cannot do"
        raise FileNotFoundError(
            f"no {self.source} at dataset.root={self.root}: expected {events} or whole files in "
            f"{download}, but {', '.join(lacking)} are missing or damaged there; {remedy}"
        )


def read_frames(path: str) -> Tensor:
    with np.load(path) as file:
        return torch.from_numpy(file["frames"])


def _datasets() -> ModuleType:
    """SpikingJelly's data sets, on machines that cannot load torchaudio too.

    The package imports it for speech, which is not needed here, and PyPI's build of it needs CUDA's
    libraries.
    """
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = ModuleType("torchaudio")
        try:
            import spikingjelly.datasets
        finally:
            del sys.modules["torchaudio"]
    import spikingjelly.datasets

    return spikingjelly.datasets


class NMNIST(EventData):
    """N-MNIST: MNIST's digits before a moving camera, 34x34.

    Source: G. Orchard, A. Jayawant, G. K. Cohen and N. Thakor, Frontiers in Neuroscience 2015.
    """

    source = "NMNIST"
    counts = (60_000, 10_000)


class DVS128Gesture(EventData):
    """DVS128 Gesture: eleven gestures of hands and arms, 128x128; 23 persons, 6 others for testing.

    Source: A. Amir et al., CVPR 2017.
    """

    source = "DVS128Gesture"
    counts = (1176, 288)


class CIFAR10DVS(EventData):
    """CIFAR10-DVS: 10000 of CIFAR10's images moved before a camera, 128x128.

    It has no split of its own. As usual with SpikingJelly, of the 1000 recordings of each class the
    first 900 in the order of their file names are for training and the last 100 for testing.
    Source: H. Li, H. Liu, X. Ji, G. Li and L. Shi, Frontiers in Neuroscience 2017.
    """

    source = "CIFAR10DVS"
    counts = (9000, 1000)

    def _sets(self) -> tuple[Files, Files]:
        return self._files().hold_out(0.1)
