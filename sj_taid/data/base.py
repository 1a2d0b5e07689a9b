"""What every data set shares: its settings, its loaders, and samples that are read file by file."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate
from torchvision.transforms import v2

from .augment import AUGMENTATIONS
from .progress import followed

log = logging.getLogger(__name__)

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


@dataclass(eq=False)
class Files(Dataset):
    """Samples that lie in a file each and are read when they are asked for.

    Args:
        paths: the files.
        labels: a class for each.
        read: makes a tensor of a file.
        remedy: what to do about a file that cannot be read.

    Raises:
        RuntimeError: a file that ``read`` cannot read, when it is asked for; names all such files.
    """

    paths: list[str]
    labels: list[int]
    read: Callable[[str], Tensor]
    remedy: str

    def __post_init__(self) -> None:
        self.checked = self.paths  # all of these, where one cannot be read

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        try:
            return self.read(path), self.labels[index]
        except Exception as error:  # each format has errors of its own for a damaged file
            log.warning("%s cannot be read; looking for others, which may take minutes", path)
            checked = followed(self.checked, "Looking for damaged files")
            others = [other for other in checked if other != path and self._is_broken(other)]
            raise RuntimeError(
                f"{path} cannot be read ({type(error).__name__}: {error}); "
                + (f"neither can {', '.join(others)}; " if others else "")
                + self.remedy
            ) from error

    def _is_broken(self, path: str) -> bool:
        try:
            self.read(path)
        except Exception:
            return True
        return False

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return default_collate([self[index] for index in indices])

    def subset(self, indices: Sequence[int]) -> Files:
        paths, labels = [self.paths[i] for i in indices], [self.labels[i] for i in indices]
        return Files(paths, labels, self.read, self.remedy)

    def mixed(self) -> Files:
        """In an order of which every part holds the classes in their proportions."""
        place = {i: (n + 0.5) / len(m) for m in self._classes() for n, i in enumerate(m)}
        return self.subset(sorted(place, key=lambda i: (place[i], self.labels[i])))

    def hold_out(self, share: float) -> tuple[Files, Files]:
        """For training and for testing: of each class, the last ``share`` is for testing."""
        train, test = [], []
        for members in self._classes():
            first = len(members) - round(len(members) * share)
            train += members[:first]
            test += members[first:]
        return self.subset(train), self.subset(test)

    def _classes(self) -> Iterable[list[int]]:
        """The indices of each class."""
        classes = defaultdict(list)
        for index, label in enumerate(self.labels):
            classes[label].append(index)
        return classes.values()

    def identity(self) -> bytes:
        return repr([(path, Path(path).stat().st_size) for path in self.paths]).encode()


Samples = InMemory | Files


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
    #: known once the samples are loaded; empty where the data set has none
    class_names: Sequence[str] = ()
    train_set: Samples
    test_set: Samples

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

    def load(self) -> tuple[Samples, Samples]:
        """The training and the test set."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train_set"):
            return
        train, test = map(self._limited, self.load())
        if isinstance(train, Files) and isinstance(test, Files):
            # In the order of their folders, the first batches and pictures would be of one class.
            test = test.mixed()
            train.checked = test.checked = [*train.paths, *test.paths]
        self.train_set, self.test_set = train, test

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

    test_dataloader = val_dataloader

    def _limited(self, samples: Samples) -> Samples:
        if self.limit is None or self.limit >= len(samples):
            return samples
        return samples.subset([i * len(samples) // self.limit for i in range(self.limit)])

    def _loader(self, samples: Samples, augment: str | None = None, **options: Any) -> DataLoader:
        augmentation = (AUGMENTATIONS[augment],) if augment else ()
        # Workers start anew with each epoch: else a resumed run could not draw what they would.
        return DataLoader(
            samples,
            self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=partial(_transformed, transform=v2.Compose([*augmentation, *self.finish])),
            **options,
        )


def _transformed(batch: Batch, transform: v2.Transform) -> Batch:
    x, label = batch
    return transform(x), label
