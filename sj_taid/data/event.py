"""Recordings of event cameras, as frames of summed events. SpikingJelly reads and converts them."""

import logging
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torchvision.datasets.utils import check_integrity
from torchvision.transforms import v2

from .._internal.checks import expand_home
from .base import LOCK, Data
from .samples import Samples

log = logging.getLogger(__name__)


CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
#: Of a source: SpikingJelly's module of its class, the published numbers of training and test
#: recordings, and the names of the classes in the order of their labels.
SOURCES = {
    "NMNIST": ("n_mnist", 60_000, 10_000, [*"0123456789"]),
    "DVS128Gesture": ("dvs128_gesture", 1176, 288, sorted(map(str, range(11)))),  # 0, 1, 10, 2, ...
    "CIFAR10DVS": ("cifar10_dvs", 9000, 1000, CIFAR10),
}


@dataclass(kw_only=True, eq=False, repr=False)
class Recordings(Data):
    """Frames ``[N, T, 2, H, W]``: how many events of each polarity fell on each pixel.

    SpikingJelly cuts each recording into T pieces with the same number of events, on the first run.
    CIFAR10DVS has no split: as usual with SpikingJelly, of the 1000 recordings of each class the
    first 900 in the order of their file names are for training and the last 100 for testing.

    Args:
        source: NMNIST, MNIST's digits in front of a moving camera, 34x34; DVS128Gesture, eleven
            gestures of 23 persons and of 6 others for testing, 128x128; or CIFAR10DVS, 10000 of
            CIFAR10's images moved in front of a camera, 128x128.
        root: the folder that holds ``download`` with the archives, or SpikingJelly's
            ``events_np`` with all recordings or some.
        T: number of frames.
        download: fetch missing archives, where SpikingJelly can; it replaces damaged ones.

    Raises:
        FileNotFoundError: neither in ``root``, or an archive that is not whole.
        OSError: recordings or frames that cannot be read.

    Sources: G. Orchard, A. Jayawant, G. K. Cohen and N. Thakor, Frontiers in Neuroscience 2015;
    A. Amir et al., CVPR 2017; H. Li, H. Liu, X. Ji, G. Li and L. Shi, Frontiers in Neuroscience
    2017.
    """

    source: Literal["NMNIST", "DVS128Gesture", "CIFAR10DVS"]
    root: Path
    T: int
    download: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        module, train, test, self.class_names = SOURCES[self.source]
        self.counts = train, test
        self.reader = f"spikingjelly.datasets.{module}:{self.source}"
        self.root = expand_home(self.root)
        self.frames = self.root / f"frames_number_{self.T}_split_by_number"

    def transforms(self) -> Sequence[v2.Transform]:
        return v2.Resize([self.image_size] * 2), v2.ToDtype(torch.float32)

    def prepare_data(self) -> None:
        if self.frames.is_dir():
            return
        if not (self.root / "events_np").is_dir():
            self._check_archives()
        with FileLock(self.root / LOCK):
            if not self.frames.is_dir():
                self._make_frames()

    def load(self) -> tuple[Samples, Samples]:
        if self.source == "CIFAR10DVS":
            return self._files(self.frames).hold_out(0.1)
        return self._files(self.frames / "train"), self._files(self.frames / "test")

    def _files(self, folder: Path) -> Samples:
        paths = sorted(folder.glob("*/*.npz"))
        remedy = f"move {self.frames} away and run again, which makes its frames again"
        found = sorted({path.parent.name for path in paths})
        if not found or not {*found} <= {*self.class_names}:
            raise OSError(
                f"{folder} has the classes {', '.join(found) or 'of no recording'}, but those of "
                f"{self.source} are {', '.join(self.class_names)}; {remedy}"
            )
        labels = [self.class_names.index(path.parent.name) for path in paths]
        return Samples([*map(str, paths)], labels, read_frames, remedy)

    def _check_archives(self) -> None:
        source, archives = load_source(self.reader), self.root / "download"
        lacks = [r for r in source.resource_url_md5() if not check_integrity(archives / r[0], r[2])]
        if lacks and not (self.download and source.downloadable()):
            remedy = "; dataset.download=true fetches them" if source.downloadable() else ""
            where = ", ".join(f"{name} from {url}" for name, url, _ in lacks)
            raise FileNotFoundError(
                f"no events_np at dataset.root={self.root}, nor download with {where}{remedy}"
            )
        archives.mkdir(parents=True, exist_ok=True)

    def _make_frames(self) -> None:
        """Make the frames in a temporary folder, which is renamed when it is complete."""
        log.info("Making %s once, which takes minutes", self.frames)
        with TemporaryDirectory(dir=self.root) as temporary:
            events, frames = Path(temporary, "events_np"), Path(temporary, self.frames.name)
            for name in ("download", "events_np"):
                if (self.root / name).is_dir():
                    Path(temporary, name).symlink_to((self.root / name).absolute())
            try:
                options = {"data_type": "frame", "frames_number": self.T, "split_by": "number"}
                if self.source != "CIFAR10DVS":
                    options["train"] = True  # the part that is asked for; it makes both
                load_source(self.reader)(temporary, **options)
            except Exception as error:  # of the network, the disk, or whatever SpikingJelly meets
                raise OSError(
                    f"cannot make frames of {self.name} in {self.root}: {error!r}"
                ) from error
            if not events.is_symlink():
                events.rename(self.root / "events_np")
            frames.rename(self.frames)


def read_frames(path: str) -> Tensor:
    with np.load(path) as file:
        return torch.from_numpy(file["frames"])


def load_source(name: str) -> Any:
    """SpikingJelly's class, also where torchaudio, which it imports for sounds, is broken."""
    stand_in = ModuleType("torchaudio")
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError):
        sys.modules["torchaudio"] = stand_in
    try:
        return pkgutil.resolve_name(name)
    finally:
        if sys.modules.get("torchaudio") is stand_in:
            del sys.modules["torchaudio"]
