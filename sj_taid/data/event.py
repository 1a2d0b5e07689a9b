"""Recordings of event cameras, as frames of summed events. SpikingJelly reads their formats."""

import logging
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor
from torchvision.datasets.utils import download_url
from torchvision.transforms import v2

from .base import LOCK, Data
from .samples import Files

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False, repr=False)
class EventData(Data):
    """Frames ``[N, T, 2, H, W]``: how many events of each polarity fell on each pixel.

    Each recording is cut into T pieces with the same number of events, on the first run, which
    leaves in ``root`` what SpikingJelly would. A part of the recordings will do.

    Args:
        root: the folder that holds ``events_np``, the unpacked recordings, or a folder
            ``download`` with their archives.
        T: number of frames.
        download: fetch missing archives, where SpikingJelly can.

    Raises:
        FileNotFoundError: none of these in ``root``.
        RuntimeError: recordings or frames that cannot be read, or no training or test recording.
        ValueError: a folder that is none of the data set's classes.
    """

    root: Path
    T: int
    download: bool = False

    source: ClassVar[str]  # SpikingJelly's class
    unpacked: ClassVar[str] = ""  # the folder by which unpacked recordings are recognised

    def __post_init__(self) -> None:
        super().__post_init__()
        self.root = Path(self.root).expanduser()
        self.archives = self.root / "download"
        self.events = self.root / "events_np"
        self.frames = self.root / f"frames_number_{self.T}_split_by_number"

    def transforms(self) -> Sequence[v2.Transform]:
        return v2.Resize([self.image_size] * 2), v2.ToDtype(torch.float32)

    def prepare_data(self) -> None:
        if self.frames.is_dir():
            return
        if not (self.events.is_dir() or self._is_unpacked()):
            self._require_archives()
        with FileLock(self.root / LOCK):
            self._make(self.events, self._convert)
            self._make(self.frames, self._integrate)

    def load(self) -> tuple[Files, Files]:
        train, test = self._split_frames()
        if not (train.paths and test.paths):
            raise RuntimeError(
                f"{self.frames} has {len(train)} training and {len(test)} test recordings of "
                f"{self.source}; it needs both"
            )
        return train, test

    def _split_frames(self) -> tuple[Files, Files]:
        return self._files(self.frames / "train"), self._files(self.frames / "test")

    def _files(self, folder: Path) -> Files:
        paths = sorted(folder.glob("*/*.npz"))
        unknown = sorted({path.parent.name for path in paths} - {*self.class_names})
        if unknown:
            raise ValueError(
                f"{folder} must hold folders of the classes {', '.join(self.class_names)}, but it "
                f"holds {', '.join(unknown)}; move them away"
            )
        labels = [self.class_names.index(path.parent.name) for path in paths]
        remedy = f"move {self.frames} away and run again, which makes its frames again"
        return Files([str(path) for path in paths], labels, read_frames, remedy)

    def _is_unpacked(self) -> bool:
        return bool(self.unpacked) and (self.root / self.unpacked).is_dir()

    def _missing_archives(self) -> list[tuple[str, str, str]]:
        """The name, URL and MD5 of each archive that is not there."""
        resources = self._spikingjelly.resource_url_md5()
        archives = [r for r in resources if r[0].endswith((".zip", ".tar.gz"))]
        return [r for r in archives if not (self.archives / r[0]).is_file()]

    def _require_archives(self) -> None:
        missing = self._missing_archives()
        can_fetch = self._spikingjelly.downloadable()
        if missing and not (can_fetch and self.download):
            expected = filter(None, [self.events.name, self.unpacked, self.archives.name])
            fetch = "add dataset.download=true" if can_fetch else f"fetch them from {missing[0][1]}"
            raise FileNotFoundError(
                f"no {self.source} at dataset.root={self.root}: expected {' or '.join(expected)} "
                f"with {', '.join(name for name, _, _ in missing)}; {fetch}"
            )
        self.archives.mkdir(parents=True, exist_ok=True)

    def _make(self, folder: Path, make: Callable[[Path], None]) -> None:
        """Make a folder, unless it is there, whole or not at all."""
        if folder.is_dir():
            return
        log.info("Making %s once, which takes minutes", folder)
        with TemporaryDirectory(dir=self.root) as temporary:
            made = Path(temporary) / folder.name
            made.mkdir()
            try:
                make(made)
            except Exception as error:  # of the network, the disk, or whatever SpikingJelly meets
                raise RuntimeError(
                    f"{self.source} in {self.root} cannot be made into frames "
                    f"({type(error).__name__}: {error}); replace damaged files, and run again"
                ) from error
            made.rename(folder)

    def _convert(self, events: Path) -> None:
        recordings = self.root
        if not self._is_unpacked():
            for name, url, md5 in self._missing_archives():
                download_url(url, events.parent, name, md5)
                (events.parent / name).rename(self.archives / name)
            recordings = events.with_name("unpacked")
            recordings.mkdir()
            self._spikingjelly.extract_downloaded_files(self.archives, recordings)
        self._spikingjelly.create_raw_from_extracted(recordings, events)

    def _integrate(self, frames: Path) -> None:
        recordings = [*self.events.rglob("*.np[yz]")]
        with ThreadPoolExecutor() as pool:
            saved = pool.map(partial(self._save_frames, frames=frames), recordings)
            for _ in track(saved, "Making frames", len(recordings), transient=True):
                pass

    def _save_frames(self, recording: Path, frames: Path) -> None:
        folder = frames / recording.parent.relative_to(self.events)
        folder.mkdir(parents=True, exist_ok=True)
        save = _datasets().integrate_events_file_to_frames_file_by_fixed_frames_number
        try:
            save(np.load, recording, folder, "number", self.T, *self._spikingjelly.get_H_W())
        except Exception as error:  # each kind of damage has an error of its own
            raise ValueError(f"{recording} cannot be read: {error}") from error

    @property
    def _spikingjelly(self) -> Any:
        return getattr(_datasets(), self.source)


def read_frames(path: str) -> Tensor:
    with np.load(path) as file:
        return torch.from_numpy(file["frames"])


def _datasets() -> ModuleType:
    """SpikingJelly's data sets, also where torchaudio, which they import, lacks libraries."""
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
    """N-MNIST: MNIST's digits in front of a moving camera, 34x34.

    Unpacked recordings are ``Train/<digit>/*.bin`` and ``Test/<digit>/*.bin``.

    Source: G. Orchard, A. Jayawant, G. K. Cohen and N. Thakor, Frontiers in Neuroscience 2015.
    """

    source = "NMNIST"
    counts = (60_000, 10_000)
    unpacked = "Train"
    class_names = tuple("0123456789")


class DVS128Gesture(EventData):
    """DVS128 Gesture: eleven gestures of hands and arms, 128x128; 23 persons, 6 others for testing.

    Source: A. Amir et al., CVPR 2017.
    """

    source = "DVS128Gesture"
    counts = (1176, 288)
    unpacked = "DvsGesture"
    class_names = tuple(sorted(map(str, range(11))))  # as text: 0, 1, 10, 2, ...


class CIFAR10DVS(EventData):
    """CIFAR10-DVS: 10000 of CIFAR10's images moved in front of a camera, 128x128.

    It has no split. As usual with SpikingJelly, of the 1000 recordings of each class the first 900
    in the order of their file names are for training and the last 100 for testing.
    Source: H. Li, H. Liu, X. Ji, G. Li and L. Shi, Frontiers in Neuroscience 2017.
    """

    source = "CIFAR10DVS"
    counts = (9000, 1000)
    class_names = (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    )

    def _split_frames(self) -> tuple[Files, Files]:
        return self._files(self.frames).hold_out(0.1)
