"""The settings and loaders that all data sets share."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Literal, Self

import lightning as L
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from torchvision.transforms import v2

from .._internal.kinds import Seed, Share
from .augment import AUGMENTATIONS, transform_each
from .samples import Batch, Samples

log = logging.getLogger(__name__)

#: In a data set's folder: one process fetches and converts, while the others wait.
LOCK = ".lock"


@dataclass(kw_only=True, eq=False, repr=False)
class Data(L.LightningDataModule):
    """Loaders of training, validation and test batches; a subclass defines ``load``.

    A batch is ``(x, label)``: images ``[N, C, H, W]`` in [-1, 1] or event frames
    ``[N, T, C, H, W]``, and labels ``[N]``, which are -1 where the data set has none.

    Args:
        name: the data set's name in runs and caches.
        channels: channels of an image or frame.
        image_size: images are resized to this height and width.
        batch_size: samples per batch.
        classes: number of classes; None without labels.
        num_workers: loader processes; 0 is right for images in memory.
        augment: how training samples vary: None, "affine", "crop_flip" or "flip".
        erase: the probability that a rectangle of a training sample, of 2 to 33 % of its area, is
            black or without events (random erasing, arXiv 1708.04896).
        mixup: pairs of training samples and of their labels are mixed, in parts from
            Beta(alpha, alpha) with this alpha; 0 is none. Labels are then ``[N, classes]``.
        limit: use only so many samples of each set, drawn at random with the classes in their
            proportions, for a quick look.
        validation: this share of the training samples, drawn likewise, is for validation and not
            for training. None or 0: there is none, and validation is on the test set.
        seed: seed of these draws; a run's own seed does not change it.

    Raises:
        ValueError: a part without samples; other classes than the data set has, or none to mix.
    """

    name: str
    channels: PositiveInt
    image_size: PositiveInt
    batch_size: PositiveInt
    classes: int | None = None
    num_workers: NonNegativeInt = 0
    augment: Literal["affine", "crop_flip", "flip"] | None = None
    erase: Share = 0.0
    mixup: NonNegativeFloat = 0.0
    limit: PositiveInt | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] | None = None
    seed: Seed = 0

    #: published numbers of training and test samples; others are logged
    counts: tuple[int, int] | None = field(init=False, default=None)
    #: known once the samples are loaded; empty where the data set has none
    class_names: Sequence[str] = field(init=False, default=())
    train_set: Samples = field(init=False)
    test_set: Samples = field(init=False)
    validation_set: Samples | None = field(init=False, default=None)
    #: the name of ``test_set`` in a protocol
    test_name: str = field(init=False, default="test")

    def __post_init__(self) -> None:
        super().__init__()
        if self.mixup and self.classes is None:
            raise ValueError("dataset.mixup mixes labels, but dataset.classes is None; set it to 0")

    def load(self) -> tuple[Samples, Samples]:
        """The training and the test set."""
        raise NotImplementedError

    def transforms(self) -> Sequence[v2.Transform]:
        """Transforms from a batch of samples to the model's input, after augmentation."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        if hasattr(self, "train_set"):
            return
        train, test = self.load()
        if self.counts not in (None, (len(train), len(test))):
            published = "%s has %d training and %d test samples, not the published %d and %d"
            log.warning(published, self.name, len(train), len(test), *self.counts)
        names = self.class_names
        if names and self.classes not in (None, len(names)):
            raise ValueError(
                f"dataset.classes={self.classes}, but {self.name} has {len(names)}: "
                f"{', '.join(names)}"
            )
        if self.validation:
            train, drawn = train.draw(round(len(train) * self.validation), self.seed)
            self.validation_set = self._prepare("validation_set", drawn)
        self.train_set = self._prepare("train_set", train)
        self.test_set = self._prepare("test_set", test)

    def _prepare(self, part: str, samples: Samples) -> Samples:
        """Check a part's labels, and take as much of it as is asked for."""
        if self.limit is not None and self.limit < len(samples):
            # Not every k-th: MNIST has images of its two sources in turn.
            _, samples = samples.draw(self.limit, self.seed)
        if not len(samples):
            raise ValueError(f"the {part} of {self.name} is empty; choose other shares")
        if self.classes is not None and (wrong := {*samples.labels} - {*range(self.classes)}):
            raise ValueError(
                f"the {part} of {self.name} has the label {min(wrong)}; those of "
                f"dataset.classes={self.classes} are 0 to {self.classes - 1}, and null is for none"
            )
        samples.check()
        if part == "train_set" or samples.read is None:
            return samples
        # In the order of their folders, the first batches and pictures would be of one class.
        return samples.interleave()

    def test_on_validation(self) -> Self:
        """The same data, with the validation set in place of the test set."""
        if self.validation_set is None:
            raise ValueError(f"{self.name} has no validation set; add dataset.validation=0.1")
        other = copy.copy(self)
        other.test_set, other.test_name = self.validation_set, "validation"
        return other

    @property
    def mirrors(self) -> bool:
        """Whether training sees mirror images."""
        return self.augment in ("flip", "crop_flip")

    def fingerprint(self, *sets: Samples) -> str:
        """A digest of these sets, by default of training and test set, for caches."""
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
        augmentations: list[Callable[[Tensor], Tensor]] = []
        if self.augment:
            augmentations.append(AUGMENTATIONS[self.augment])
        if self.erase:
            augmentations.append(partial(transform_each, transform=v2.RandomErasing(self.erase)))
        if self.mixup:
            options["mixup"] = v2.MixUp(alpha=self.mixup, num_classes=self.classes)
        return self.loader(self.train_set, augmentations, **options)

    def val_dataloader(self) -> DataLoader:
        return self.loader(self.test_set if self.validation_set is None else self.validation_set)

    def test_dataloader(self) -> DataLoader:
        return self.loader(self.test_set)

    def loader(
        self,
        samples: Samples,
        augmentations: Sequence[Callable[[Tensor], Tensor]] = (),
        mixup: v2.MixUp | None = None,
        **options: Any,
    ) -> DataLoader:
        """Batches of ``samples``, without more in their order; ``options`` are the DataLoader's."""
        transform = v2.Compose([*augmentations, *self.transforms()])
        # Worker processes start again with each epoch: else a resumed run could not draw what they
        # would.
        return DataLoader(
            samples,
            **{"batch_size": self.batch_size, "num_workers": self.num_workers} | options,
            pin_memory=torch.cuda.is_available(),
            collate_fn=partial(_collate, transform=transform, mixup=mixup),
        )


def _collate(batch: Batch, transform: v2.Transform, mixup: v2.MixUp | None) -> Batch:
    x, label = batch
    x = transform(x)
    if mixup is None:
        return x, label
    # The frames of a sequence share the draws.
    mixed, probabilities = mixup(x.flatten(1, -3), label)
    return mixed.view_as(x), probabilities
