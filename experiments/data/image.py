"""Still images, kept in memory."""

from __future__ import annotations

import math
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from .augment import AUGMENTATIONS


class Batches(TensorDataset):
    """Images ``[n, C, H, W]`` in uint8 and their labels; fetched and transformed batch by batch."""

    def __init__(self, images: Tensor, labels: Tensor, transform: v2.Transform) -> None:
        super().__init__(images, labels)
        self.transform = transform

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        images, labels = self[indices]
        return self.transform(images), labels


def as_it_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Collate nothing: the batch is one already."""
    return batch


class ImageData(L.LightningDataModule):
    """Images in memory; a subclass says where they come from.

    A batch is images ``[N, C, H, W]`` in [-1, 1] and labels ``[N]``.

    Args:
        name: what the run is called after.
        channels: image channels.
        image_size: images are resized to this height and width.
        batch_size: images a batch.
        classes: how many there are; None without labels.
        num_workers: loader processes; 0 is right for images in memory.
        augment: how training images vary: None, "affine", "crop_flip" or "flip".
    """

    def __init__(
        self,
        name: str,
        channels: int,
        image_size: int,
        batch_size: int,
        classes: int | None = None,
        num_workers: int = 0,
        augment: str | None = None,
    ) -> None:
        super().__init__()
        if augment is not None and augment not in AUGMENTATIONS:
            raise ValueError(
                f"dataset.augment must be null or one of {', '.join(AUGMENTATIONS)}, "
                f"but it is {augment!r}"
            )
        self.name = name
        self.channels = channels
        self.image_size = image_size
        self.batch_size = batch_size
        self.classes = classes
        self.num_workers = num_workers
        self.augment = augment
        self.train_set: Batches | None = None
        self.test_set: Batches | None = None

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training images and labels, test images and labels; images ``[n, C, H, W]`` in uint8."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is None:
            train_x, train_y, test_x, test_y = self.load()
            finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
            augment = [AUGMENTATIONS[self.augment]] if self.augment else []
            resize = v2.Resize((self.image_size, self.image_size))
            self.train_set = Batches(resize(train_x), train_y, v2.Compose([*augment, *finish]))
            self.test_set = Batches(resize(test_x), test_y, v2.Compose(finish))

    def train_dataloader(self) -> DataLoader:
        # A last small batch would make noisy batch-norm statistics.
        drop_last = len(self.train_set) >= self.batch_size
        return self._loader(self.train_set, shuffle=True, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def _loader(self, dataset: Batches, **options: bool) -> DataLoader:
        return DataLoader(
            dataset,
            self.batch_size,
            num_workers=self.num_workers,
            collate_fn=as_it_is,
            persistent_workers=self.num_workers > 0,
            **options,
        )


class Digits(ImageData):
    """scikit-learn's handwritten digits: 1797 images of 8x8, shipped in its wheel.

    Every fifth image is for testing. Source: E. Alpaydin and C. Kaynak, UCI 1998, CC BY 4.0.
    """

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = torch.tensor(digits.images).unsqueeze(1).mul(255 / 16).round().to(torch.uint8)
        labels = torch.tensor(digits.target)
        test = torch.arange(len(images)) % 5 == 4
        return images[~test], labels[~test], images[test], labels[test]


class MNIST(ImageData):
    """MNIST through torchvision: 60000 training and 10000 test images of 28x28.

    Args:
        root: the folder that holds ``MNIST/raw``.
        download: fetch the files if they are not there.
        limit: use only the first images of each set, for a quick look.

    Raises:
        FileNotFoundError: no data at ``root`` and ``download`` is off.
        RuntimeError: files that are there but damaged.

    Source: Y. LeCun, C. Cortes and C. Burges, 1998.
    """

    TRAIN, TEST = 60_000, 10_000
    FILES = (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    )

    def __init__(
        self, root: str, download: bool = False, limit: int | None = None, **options: int | str
    ) -> None:
        super().__init__(**options)
        self.root = Path(root).expanduser()
        self.download = download
        self.limit = limit

    def prepare_data(self) -> None:
        if self.download:
            self._dataset(train=True, download=True)

    def load(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return (*self._images(train=True), *self._images(train=False))

    def _images(self, train: bool) -> tuple[Tensor, Tensor]:
        dataset = self._dataset(train)
        expected = self.TRAIN if train else self.TEST
        shape = (expected, 28, 28)
        if dataset.data.shape != shape or len(dataset.targets) != expected:
            raise RuntimeError(
                f"MNIST in {self.root} is damaged: expected {list(shape)} images and {expected} "
                f"labels, found {list(dataset.data.shape)} and {len(dataset.targets)}; delete "
                f"{self.root / 'MNIST'} and run again with dataset.download=true"
            )
        limit = math.inf if self.limit is None else self.limit
        keep = slice(None, min(limit, expected))
        return dataset.data[keep].unsqueeze(1), dataset.targets[keep]

    def _dataset(self, train: bool, download: bool = False):
        from torchvision import datasets

        raw = self.root / "MNIST" / "raw"
        missing = [name for name in self.FILES if not (raw / name).is_file()]
        if missing and not download:
            raise FileNotFoundError(
                f"no MNIST at dataset.root={self.root}: {raw} lacks {', '.join(missing)}; point "
                "dataset.root to the folder that holds MNIST/raw or add dataset.download=true"
            )
        try:
            return datasets.MNIST(self.root, train=train, download=download)
        except (RuntimeError, ValueError, EOFError) as error:
            raise RuntimeError(
                f"MNIST in {self.root} cannot be read ({error}); delete {self.root / 'MNIST'} and "
                "run again with dataset.download=true"
            ) from error
