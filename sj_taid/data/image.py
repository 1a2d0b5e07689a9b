"""Still images in memory: scikit-learn's digits, and data sets of torchvision."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from filelock import FileLock
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import v2

from .._internal.checks import expand_home
from .base import LOCK, Data
from .samples import Samples


class ImageData(Data):
    """Images, in uint8 until they are in a batch, where they run from -1 to 1."""

    def transforms(self) -> Sequence[v2.Transform]:
        return v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])

    def describe_test_set(self) -> str:
        """The images that metrics are measured on, for their protocols."""
        size = f"{self.image_size}x{self.image_size}"
        return f"{len(self.test_set)} {self.test_name} images at {size}"

    def _in_memory(self, images: Tensor, labels: Any) -> Samples:
        return Samples(v2.functional.resize(images, [self.image_size] * 2), labels)


class Digits(ImageData):
    """scikit-learn's handwritten digits: 1797 images of 8x8, shipped in its wheel.

    Every fifth image is for testing. Source: E. Alpaydin and C. Kaynak, UCI 1998, CC BY 4.0.
    """

    def load(self) -> tuple[Samples, Samples]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        self.class_names = [str(name) for name in digits.target_names]
        images = torch.tensor(digits.images).unsqueeze(1).mul(255 / 16).round().to(torch.uint8)
        samples = self._in_memory(images, digits.target)
        train = [i for i in range(len(samples)) if i % 5 != 4]
        return samples.subset(train), samples.subset(range(4, len(samples), 5))


@dataclass(kw_only=True, eq=False, repr=False)
class Torchvision(ImageData):
    """A data set of torchvision, loaded into memory.

    Args:
        source: its class in ``torchvision.datasets``, one of ``sources``.
        root: the folder that holds the data set's own folder.
        download: fetch it if files are missing.

    Raises:
        FileNotFoundError: no such folder and ``download`` is off.
        OSError: files that are missing or damaged, or a download that failed.
        ValueError: another source.

    Sources: Y. LeCun, C. Cortes and C. Burges, 1998; H. Xiao, K. Rasul and R. Vollgraf, arXiv
    1708.07747; A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    #: the published numbers of training and test images
    sources: ClassVar = {
        **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST"), (60_000, 10_000)),
        **dict.fromkeys(("CIFAR10", "CIFAR100"), (50_000, 10_000)),
    }
    source: str
    root: Path
    download: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.source not in self.sources:
            raise ValueError(
                f"dataset.source must be one of {', '.join(self.sources)}, but it is "
                f"{self.source!r}; save its images in folders, for dataset=image_folder"
            )
        self.read, self.counts = getattr(datasets, self.source), self.sources[self.source]
        self.root = expand_home(self.root)
        self.folder = getattr(self.read, "base_folder", f"{self.source}/raw")
        self.path = self.root / self.folder

    def prepare_data(self) -> None:
        if self.download:
            self.root.mkdir(parents=True, exist_ok=True)
            with FileLock(self.root / LOCK), self._remedy():
                self.read(self.root, download=True)  # does nothing where the files are whole

    def load(self) -> tuple[Samples, Samples]:
        return self._part(train=True), self._part(train=False)

    def _part(self, train: bool) -> Samples:
        with self._remedy():
            source = self.read(self.root, train=train)
        self.class_names = getattr(source, "classes", ())
        pixels = torch.as_tensor(source.data)  # [n, H, W] or [n, H, W, C]
        images = pixels.view(*pixels.shape[:3], -1).permute(0, 3, 1, 2).contiguous()
        return self._in_memory(images, source.targets)

    @contextmanager
    def _remedy(self) -> Iterator[None]:
        """Name the remedy for whatever torchvision's checks and readers find."""
        name = self.source
        if not (self.download or self.path.is_dir()):
            raise FileNotFoundError(
                f"no {name} at dataset.root={self.root}: point it to the folder that holds "
                f"{self.folder}, or add dataset.download=true"
            )
        try:
            yield
        except Exception as error:
            raise OSError(
                f"{name} in {self.path} is missing or damaged ({type(error).__name__}: {error}); "
                "move it away, and add dataset.download=true"
            ) from error
