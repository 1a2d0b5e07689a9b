"""What every data set shares: its settings, its loaders, and samples that are read file by file."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from torchvision.transforms import v2

from .augment import AUGMENTATIONS

Batch = tuple[Tensor, Tensor]

#: In a data set's folder: of the processes of one run or of a sweep, one fetches and converts, and
#: the others wait for it.
LOCK = ".lock"


class InMemory(TensorDataset):
    """Samples ``[n, ...]`` and labels ``[n]``; a batch is fetched by one indexing."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self[indices]

    def subset(self, indices: Sequence[int]) -> InMemory:
        return InMemory(*self[list(indices)])

    def identity(self) -> bytes:
        return b"".join(tensor.numpy().tobytes() for tensor in self.tensors)


class Files(Dataset):
    """Samples that lie in a file each and are read when they are asked for.

    Args:
        paths: the files.
        labels: a class for each.
        read: makes a tensor of a file.
        remedy: what to do about a file that cannot be read.

    Raises:
        RuntimeError: a file that ``read`` cannot read, when it is asked for.
    """

    def __init__(
        self, paths: list[str], labels: list[int], read: Callable[[str], Tensor], remedy: str
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.read = read
        self.remedy = remedy

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        try:
            return self.read(path), self.labels[index]
        except Exception as error:  # each format has errors of its own for a damaged file
            raise RuntimeError(
                f"{path} cannot be read ({type(error).__name__}: {error}); {self.remedy}"
            ) from error

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return default_collate([self[index] for index in indices])

    def subset(self, indices: Sequence[int]) -> Files:
        paths, labels = ([kept[i] for i in indices] for kept in (self.paths, self.labels))
        return Files(paths, labels, self.read, self.remedy)

    def identity(self) -> bytes:
        return repr([(path, Path(path).stat().st_size) for path in self.paths]).encode()


Samples = InMemory | Files


def hold_out(samples: Files, share: float) -> tuple[Files, Files]:
    """For training and for testing: of each class, the last ``share`` is for testing."""
    classes = defaultdict(list)
    for index, label in enumerate(samples.labels):
        classes[label].append(index)
    train, test = [], []
    for members in classes.values():
        first = len(members) - round(len(members) * share)
        train += members[:first]
        test += members[first:]
    return samples.subset(train), samples.subset(test)


class Data(L.LightningDataModule):
    """Loaders of training and test batches; a subclass says where the samples come from.

    A batch is ``(x, label)``: images ``[N, C, H, W]`` in [-1, 1] or event frames
    ``[N, T, C, H, W]``, and labels ``[N]``, which are -1 where the data set has none.

    Args:
        name: what the run is called after.
        channels: channels of an image or frame.
        image_size: images are resized to this height and width.
        batch_size: samples a batch.
        classes: how many there are; None without labels.
        num_workers: loader processes; 0 is right for images in memory.
        augment: how training samples vary: None, "affine", "crop_flip" or "flip".
        limit: use only so many samples of each set, spread evenly, for a quick look.
    """

    #: what turns a batch of samples into the model's input, after augmentation
    finish: tuple[v2.Transform, ...]

    def __init__(
        self,
        name: str,
        channels: int,
        image_size: int,
        batch_size: int,
        classes: int | None = None,
        num_workers: int = 0,
        augment: str | None = None,
        limit: int | None = None,
    ) -> None:
        super().__init__()
        if augment is not None and augment not in AUGMENTATIONS:
            raise ValueError(
                f"dataset.augment must be null or one of {', '.join(AUGMENTATIONS)}, "
                f"but it is {augment!r}"
            )
        if limit is not None and limit < 1:
            raise ValueError(f"dataset.limit must be null or at least 1, but it is {limit}")
        self.name = name
        self.channels = channels
        self.image_size = image_size
        self.batch_size = batch_size
        self.classes = classes
        self.num_workers = num_workers
        self.augment = augment
        self.limit = limit
        self.train_set: Samples | None = None
        self.test_set: Samples | None = None

    def load(self) -> tuple[Samples, Samples]:
        """The training and the test set."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if self.train_set is None:
            self.train_set, self.test_set = map(self._limited, self.load())

    def fingerprint(self) -> str:
        """Stands for these samples at this size, so that what was made from them can be kept."""
        digest = hashlib.sha256(repr((self.channels, self.image_size)).encode())
        for samples in (self.train_set, self.test_set):
            digest.update(samples.identity())
        return digest.hexdigest()[:16]

    def train_dataloader(self) -> DataLoader:
        # A last small batch would make noisy batch-norm statistics.
        drop_last = len(self.train_set) >= self.batch_size
        return self._loader(self.train_set, self.augment, shuffle=True, drop_last=drop_last)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def _limited(self, samples: Samples) -> Samples:
        if self.limit is None or self.limit >= len(samples):
            return samples
        return samples.subset([i * len(samples) // self.limit for i in range(self.limit)])

    def _loader(self, samples: Samples, augment: str | None = None, **options: bool) -> DataLoader:
        augmentation = (AUGMENTATIONS[augment],) if augment else ()
        return DataLoader(
            samples,
            self.batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            collate_fn=partial(_transformed, transform=v2.Compose([*augmentation, *self.finish])),
            **options,
        )


def _transformed(batch: Batch, transform: v2.Transform) -> Batch:
    x, label = batch
    return transform(x), label
