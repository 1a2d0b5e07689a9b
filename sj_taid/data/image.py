"""Still images, kept in memory: scikit-learn's digits, and MNIST, FashionMNIST and CIFAR10."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.utils import calculate_md5
from torchvision.transforms import v2

from .base import LOCK, Data, InMemory


class ImageData(Data):
    """Images, in uint8 until they are in a batch, where they run from -1 to 1."""

    finish = (v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5]))

    def test_images(self) -> str:
        """What metrics are measured on, for their protocols."""
        size = f"{self.image_size}x{self.image_size}"
        return f"{len(self.test_set)} {self.tested_on} images at {size}"

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


class Torchvision(ImageData):
    """A data set that torchvision can fetch.

    Args:
        root: the folder that holds the data set's own folder.
        download: fetch it if files are missing.

    Raises:
        FileNotFoundError: files are missing and ``download`` is off.
        RuntimeError: files that are there but damaged, or a download that failed.
    """

    source: type[datasets.VisionDataset]
    folder: str  # the data set's own, below root
    files: tuple[str, ...]

    def __init__(self, root: str, download: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()
        self.download = download
        self.place = self.root / self.folder

    def prepare_data(self) -> None:
        if not self.download:
            return
        self.root.mkdir(parents=True, exist_ok=True)
        with FileLock(self.root / LOCK):
            if self._missing():
                self._fetch()

    def _fetch(self) -> None:
        try:
            self.source(self.root, download=True)
        except Exception as error:  # of the network, the disk or the archive
            raise RuntimeError(
                f"{self.source.__name__} cannot be downloaded ({type(error).__name__}: {error}); "
                f"try again, or put into {self.place} by hand: {', '.join(self.files)}"
            ) from error

    def _missing(self) -> list[str]:
        return [name for name in self.files if not (self.place / name).exists()]

    def _require_files(self) -> None:
        missing = self._missing()
        if missing:
            raise FileNotFoundError(
                f"no {self.source.__name__} at dataset.root={self.root}: {self.place} lacks "
                f"{', '.join(missing)}; point dataset.root to the folder that holds "
                f"{self.folder} or add dataset.download=true"
            )

    def _damaged(self, name: str, how: str) -> RuntimeError:
        return RuntimeError(
            f"{self.place / name} is damaged: {how}; put a whole one in its place, or move it away "
            "and run again with dataset.download=true"
        )

    def _require_md5(self, name: str, expected: str) -> None:
        found = calculate_md5(self.place / name)
        if found != expected:
            raise self._damaged(name, f"its MD5 is {found} and should be {expected}")


class TorchvisionInMemory(Torchvision):
    """One that fits in memory."""

    def load(self) -> tuple[InMemory, InMemory]:
        self._require_files()
        for name in self.files:
            self._require_whole(name)
        return self._part(train=True), self._part(train=False)

    def _require_whole(self, name: str) -> None:
        """Raise if the file is damaged."""
        raise NotImplementedError

    def _part(self, train: bool) -> InMemory:
        try:
            source = self.source(self.root, train=train)
        except Exception as error:  # whatever the reader trips over
            raise self._damaged("", f"{type(error).__name__}: {error}") from error
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
    files = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )
    counts = (60_000, 10_000)  # of images for training and for testing

    def _require_whole(self, name: str) -> None:
        count = self.counts[0 if name.startswith("train") else 1]
        expected = 16 + count * 28 * 28 if "images" in name else 8 + count
        found = (self.place / name).stat().st_size
        if found != expected:
            raise self._damaged(name, f"it has {found} bytes and should have {expected}")


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
    MD5: ClassVar[dict[str, str]] = {
        **dict(source.train_list),
        **dict(source.test_list),
        source.meta["filename"]: source.meta["md5"],
    }
    files = tuple(MD5)

    def _require_whole(self, name: str) -> None:
        self._require_md5(name, self.MD5[name])
