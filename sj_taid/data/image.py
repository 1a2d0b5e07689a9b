"""Still images in memory: scikit-learn's digits, and MNIST, FashionMNIST and CIFAR10."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from filelock import FileLock
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from .base import LOCK, Data
from .samples import InMemory


class ImageData(Data):
    """Images, in uint8 until they are in a batch, where they run from -1 to 1."""

    def transforms(self) -> Sequence[v2.Transform]:
        return v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])

    def describe_test_set(self) -> str:
        """The images that metrics are measured on, for their protocols."""
        size = f"{self.image_size}x{self.image_size}"
        return f"{len(self.test_set)} {self.test_name} images at {size}"

    def _in_memory(self, images: Tensor, labels: Tensor) -> InMemory:
        return InMemory(v2.functional.resize(images, [self.image_size] * 2), labels)


class Digits(ImageData):
    """scikit-learn's handwritten digits: 1797 images of 8x8, shipped in its wheel.

    Every fifth image is for testing. Source: E. Alpaydin and C. Kaynak, UCI 1998, CC BY 4.0.
    """

    def load(self) -> tuple[InMemory, InMemory]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.class_names = [str(name) for name in digits.target_names]
        images = torch.tensor(digits.images).unsqueeze(1).mul(255 / 16).round().to(torch.uint8)
        samples = self._in_memory(images, torch.tensor(digits.target))
        train = [i for i in range(len(samples)) if i % 5 != 4]
        return samples.subset(train), samples.subset(range(4, len(samples), 5))


@dataclass(kw_only=True, eq=False, repr=False)
class Torchvision(ImageData):
    """A data set that torchvision can fetch.

    Args:
        root: the folder that holds the data set's own folder.
        download: fetch it if files are missing.

    Raises:
        FileNotFoundError: files are missing and ``download`` is off.
        RuntimeError: files that are there but damaged, or a download that failed.
    """

    root: Path
    download: bool = False

    source: ClassVar[type[datasets.VisionDataset]]
    folder: ClassVar[str]  # the data set's own, in root
    files: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.root = Path(self.root).expanduser()
        self.path = self.root / self.folder

    def prepare_data(self) -> None:
        if not self.download:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / LOCK):
            if not self._missing():
                return
            try:
                self.source(self.root, download=True)
            except Exception as error:  # of the network, the disk or the archive
                raise RuntimeError(
                    f"{self.source.__name__} cannot be downloaded "
                    f"({type(error).__name__}: {error}); try again, or put into {self.path} by "
                    f"hand: {', '.join(self.files)}"
                ) from error

    def _missing(self) -> list[str]:
        return [name for name in self.files if not (self.path / name).exists()]

    def _require_files(self) -> None:
        missing = self._missing()
        if missing:
            raise FileNotFoundError(
                f"no {self.source.__name__} at dataset.root={self.root}: {self.path} lacks "
                f"{', '.join(missing)}; point dataset.root to the folder that holds "
                f"{self.folder} or add dataset.download=true"
            )

    def _damaged(self, path: Path, how: str) -> RuntimeError:
        return RuntimeError(
            f"{path} is damaged: {how}; put whole files in its place, or move it away and run "
            "again with dataset.download=true"
        )


class TorchvisionInMemory(Torchvision):
    """One that fits in memory."""

    def load(self) -> tuple[InMemory, InMemory]:
        self._require_files()
        return self._part(train=True), self._part(train=False)

    def _part(self, train: bool) -> InMemory:
        try:
            source = self.source(self.root, train=train)
        except Exception as error:  # whatever torchvision's checks and readers find
            raise self._damaged(self.path, f"{type(error).__name__}: {error}") from error
        self.class_names = source.classes
        pixels = torch.as_tensor(source.data)  # [n, H, W] or [n, H, W, C]
        images = pixels.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2).contiguous()
        return self._in_memory(images, torch.as_tensor(source.targets))


class MNIST(TorchvisionInMemory):
    """MNIST: 60000 training and 10000 test images of 28x28.

    Source: Y. LeCun, C. Cortes and C. Burges, 1998.
    """

    source = datasets.MNIST
    folder = "MNIST/raw"
    files = tuple(Path(archive).stem for archive, _ in source.resources)
    counts = (60_000, 10_000)


class FashionMNIST(MNIST):
    """FashionMNIST: clothes, in MNIST's format and numbers.

    Source: H. Xiao, K. Rasul and R. Vollgraf, arXiv 1708.07747.
    """

    source = datasets.FashionMNIST
    folder = "FashionMNIST/raw"


class CIFAR10(TorchvisionInMemory):
    """CIFAR10: 50000 training and 10000 test images of 3x32x32.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    source = datasets.CIFAR10
    folder = source.base_folder
    files = (*dict([*source.train_list, *source.test_list]), source.meta["filename"])
    counts = (50_000, 10_000)
