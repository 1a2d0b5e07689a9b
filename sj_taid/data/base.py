"""What every data set shares: its settings, its loaders, and samples that are read file by file."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from os.path import commonpath
from pathlib import Path
from typing import Any, Literal, Self

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    TensorDataset,
    default_collate,
)
from torchvision.transforms import v2

from .augment import AUGMENTATIONS, each, mix

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
Variation = Callable[[Tensor], Tensor]
Mix = Callable[[Tensor, Tensor], Batch]

#: In a data set's folder: of the processes of one run or of a sweep, one fetches and converts, and
#: the others wait for it.
LOCK = ".lock"


class Samples(Dataset):
    """Samples whose classes are known before they are read."""

    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int]) -> Self:
        raise NotImplementedError

    def identity(self) -> bytes:
        """What tells these samples from others."""
        raise NotImplementedError

    def mixed(self) -> Self:
        """In an order of which every part holds the classes in their proportions."""
        return self.subset(self._mixed(range(len(self))))

    def drawn(self, n: int, seed: int) -> tuple[list[int], list[int]]:
        """The indices without ``n`` that are drawn at random, and those ``n``, each in order.

        Both parts hold the classes in their proportions.
        """
        generator = torch.Generator().manual_seed(seed)
        order = self._mixed(torch.randperm(len(self), generator=generator).tolist())
        return sorted(order[n:]), sorted(order[:n])

    def _mixed(self, order: Iterable[int]) -> list[int]:
        # Classes at one place are in the order of their first samples, at random where that is.
        place = {i: (n + 0.5) / len(m) for m in self._classes(order) for n, i in enumerate(m)}
        return sorted(place, key=place.__getitem__)

    def _classes(self, order: Iterable[int]) -> Iterable[list[int]]:
        """The indices of each class, in the order given."""
        labels, classes = self.labels, defaultdict(list)
        for index in order:
            classes[labels[index]].append(index)
        return classes.values()


class InMemory(Samples, TensorDataset):
    """Samples ``[n, ...]`` and labels ``[n]``; a batch is fetched by one indexing."""

    def __init__(self, *tensors: Tensor) -> None:
        super().__init__(*tensors)
        self.labels = tensors[1].tolist()

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return self[indices]

    def subset(self, indices: Sequence[int]) -> Self:
        return type(self)(*self[list(indices)])

    def identity(self) -> bytes:
        return b"".join(tensor.numpy().tobytes() for tensor in self.tensors)


@dataclass(eq=False)
class Files(Samples):
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

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        try:
            return self.read(path), self.labels[index]
        except Exception as error:  # each format has errors of its own for a damaged file
            log.warning("%s cannot be read; looking for others, which may take minutes", path)
            others = [other for other in self.checked if other != path and self._is_broken(other)]
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

    def subset(self, indices: Sequence[int]) -> Self:
        paths, labels = [self.paths[i] for i in indices], [self.labels[i] for i in indices]
        return type(self)(paths, labels, self.read, self.remedy)

    def hold_out(self, share: float) -> tuple[Self, Self]:
        """For training and for testing: of each class, the last ``share`` is for testing."""
        train, test = [], []
        for members in self._classes(range(len(self))):
            first = len(members) - round(len(members) * share)
            train += members[:first]
            test += members[first:]
        return self.subset(train), self.subset(test)

    def identity(self) -> bytes:
        start = len(commonpath(self.paths or [""]))  # the same data elsewhere are the same
        names = [(path[start:], Path(path).stat().st_size) for path in self.paths]
        # Raw images of one size have one length: a look into some tells data sets apart.
        some = self.paths[:: max(len(self.paths) // 64, 1)]
        seen = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in some]
        return repr((names, seen)).encode()


class Data(L.LightningDataModule):
    """Loaders of training, validation and test batches; a subclass says where they come from.

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
        erase: the probability that a rectangle of a training sample, of 2 to 33 % of its area, is
            black or without events (random erasing, arXiv 1708.04896).
        mixup: pairs of training samples and of their labels are mixed, in parts from
            Beta(alpha, alpha) with this alpha; 0 is none. Labels are then ``[N, classes]``.
        cutmix: likewise a rectangle of one is put into the other; with both, either.
        limit: use only so many samples of each set, drawn at random with the classes in their
            proportions, for a quick look.
        validation: this share of the training samples, drawn likewise, is for validation and not
            for training; ``"own"`` takes the set that the data set brings for it. None or 0: there
            is none, and validation is on the test set.
        seed: of these draws; a run's own seed does not change it.

    Raises:
        ValueError: values out of their range; ``"own"`` where there is none of its own; a share
            that leaves nothing.
    """

    #: what turns a batch of samples into the model's input, after augmentation
    finish: tuple[v2.Transform, ...]
    #: known once the samples are loaded; empty where the data set has none
    class_names: Sequence[str] = ()
    train_set: Samples
    test_set: Samples
    validation_set: Samples | None = None
    #: what ``test_set`` is, in the words of a protocol
    tested_on = "test"

    def __init__(
        self,
        name: str,
        channels: int,
        image_size: int,
        batch_size: int,
        classes: int | None = None,
        num_workers: int = 0,
        augment: str | None = None,
        erase: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        limit: int | None = None,
        validation: float | Literal["own"] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if augment is not None and augment not in AUGMENTATIONS:
            raise ValueError(
                f"dataset.augment must be null or one of {', '.join(AUGMENTATIONS)}, "
                f"but it is {augment!r}"
            )
        if not 0 <= erase <= 1:
            raise ValueError(f"dataset.erase must be a probability, but it is {erase}")
        for key, alpha in (("mixup", mixup), ("cutmix", cutmix)):
            if alpha < 0 or (alpha and classes is None):
                raise ValueError(
                    f"dataset.{key} must be 0, or an alpha above it for data with labels, but it "
                    f"is {alpha} and dataset.classes is {classes}"
                )
        if limit is not None and limit < 1:
            raise ValueError(f"dataset.limit must be null or at least 1, but it is {limit}")
        is_share = isinstance(validation, int | float) and 0 <= validation < 1
        if not (validation in (None, "own") or is_share):
            raise ValueError(
                "dataset.validation must be null, a share of the training set from 0 to below 1, "
                f"or own, but it is {validation!r}"
            )
        self.name = name
        self.channels = channels
        self.image_size = image_size
        self.batch_size = batch_size
        self.classes = classes
        self.num_workers = num_workers
        self.augment = augment
        self.erase = erase
        self.mixup = mixup
        self.cutmix = cutmix
        self.limit = limit
        self.validation = validation
        self.seed = seed

    def load(self) -> tuple[Samples, Samples]:
        """The training and the test set."""
        raise NotImplementedError

    def load_validation(self) -> Samples:
        """The validation set that the data set brings."""
        raise ValueError(
            f"{self.name} has no validation set of its own; give a share of its training set, as "
            "dataset.validation=0.1"
        )

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train_set"):
            return
        train, test = self.load()
        train, validation = self._split(train)
        self.train_set = self._limited(train)
        if validation is not None:
            self.validation_set = self._held_out(validation)
        self.test_set = self._held_out(test)
        sets = (self.train_set, self.validation_set, self.test_set)
        files = [samples for samples in sets if isinstance(samples, Files)]
        for samples in files:
            samples.checked = [path for other in files for path in other.paths]

    def validating(self) -> Self:
        """The same data, with the validation set in place of the test set."""
        if self.validation_set is None:
            raise ValueError(f"{self.name} has no validation set; add dataset.validation=0.1")
        other = copy.copy(self)
        other.test_set, other.tested_on = self.validation_set, "validation"
        return other

    def fingerprint(self, *sets: Samples) -> str:
        """Stands for these samples at this size, so that what was made from them can be kept.

        Without ``sets`` for those of the training and the test set.
        """
        digest = hashlib.sha256(repr((self.channels, self.image_size)).encode())
        for samples in sets or (self.train_set, self.test_set):
            digest.update(samples.identity())
        return digest.hexdigest()[:16]

    def train_dataloader(self) -> DataLoader:
        processes = self.trainer.world_size if self.trainer else 1
        share = -(-len(self.train_set) // processes)
        # A last small batch would make noisy batch-norm statistics.
        options: dict[str, Any] = {"drop_last": share >= self.batch_size}
        if self.trainer and processes > 1:
            # The sampler that Lightning would put in has the order of the first epoch when a run is
            # resumed, since loader processes fetch ahead before they hear of another.
            options["sampler"] = DistributedSampler(self.train_set, seed=torch.initial_seed())
            epochs: Any = self.trainer.fit_loop.epoch_progress.current
            options["sampler"].set_epoch(epochs.processed)  # current_epoch is one behind here
        else:
            options["shuffle"] = True
        return self._loader(self.train_set, self._variations(), self._mix(), **options)

    def plain(self) -> Self:
        """The same data, with training samples as they are."""
        other = copy.copy(self)
        other.augment, other.erase, other.mixup, other.cutmix = None, 0.0, 0.0, 0.0
        return other

    def train_samples(self) -> DataLoader:
        """The training samples once, in their order and as they are."""
        return self._loader(self.train_set)

    def val_dataloader(self) -> DataLoader:
        return self._loader(self.test_set if self.validation_set is None else self.validation_set)

    def test_dataloader(self) -> DataLoader:
        return self._loader(self.test_set)

    def _split(self, train: Samples) -> tuple[Samples, Samples | None]:
        """What is left for training, and the validation set if there is to be one."""
        if not self.validation:
            return train, None
        if self.validation == "own":
            return train, self.load_validation()
        rest, drawn = train.drawn(round(len(train) * self.validation), self.seed)
        if not (rest and drawn):
            raise ValueError(
                f"dataset.validation={self.validation} of the {len(train)} training samples leaves "
                f"{len(rest)} for training and {len(drawn)} for validation; choose another share"
            )
        return train.subset(rest), train.subset(drawn)

    def _held_out(self, samples: Samples) -> Samples:
        samples = self._limited(samples)
        # In the order of their folders, the first batches and pictures would be of one class.
        return samples.mixed() if isinstance(samples, Files) else samples

    def _limited(self, samples: Samples) -> Samples:
        if self.limit is None or self.limit >= len(samples):
            return samples
        # Not every k-th: MNIST has images of its two sources in turn.
        _, drawn = samples.drawn(self.limit, self.seed)
        return samples.subset(drawn)

    def _variations(self) -> list[Variation]:
        """What changes training samples one by one."""
        found: list[Variation] = [AUGMENTATIONS[self.augment]] if self.augment else []
        if self.erase:
            found.append(partial(each, transform=v2.RandomErasing(self.erase)))
        return found

    def _mix(self) -> Mix | None:
        """What mixes training samples and their labels."""
        if self.classes is None or not (self.mixup or self.cutmix):
            return None
        return partial(mix, mixup=self.mixup, cutmix=self.cutmix, classes=self.classes)

    def _loader(
        self,
        samples: Samples,
        variations: Sequence[Variation] = (),
        mixing: Mix | None = None,
        **options: Any,
    ) -> DataLoader:
        transform = v2.Compose([*variations, *self.finish])
        # Workers start anew with each epoch: else a resumed run could not draw what they would.
        return DataLoader(
            samples,
            self.batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=partial(_transformed, transform=transform, mixing=mixing),
            **options,
        )


def _transformed(batch: Batch, transform: v2.Transform, mixing: Mix | None) -> Batch:
    x, label = batch
    x = transform(x)
    return mixing(x, label) if mixing else (x, label)
