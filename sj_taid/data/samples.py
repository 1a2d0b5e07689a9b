"""Samples and their labels, in memory or in files, and draws that keep the classes' proportions."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from os.path import commonpath
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Samples(Dataset):
    """Samples and their labels, in memory or in files, which are read when they are asked for.

    Args:
        samples: a tensor ``[n, ...]``, or the path of each one's file.
        labels: a class for each, ``[n]``; -1 is none.
        read: reads a file as a tensor; None if the samples are in memory.
        look: raises an error for a file that ``read`` cannot read, as far as its head says.
        remedy: what to do about a file that cannot be read.

    Raises:
        ValueError: more or fewer labels than samples.
        OSError: a file that ``read`` cannot read, when it is asked for.
    """

    samples: Any
    labels: list[int]
    read: Callable[[str], Tensor] | None = None
    remedy: str = ""
    look: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self.labels = torch.as_tensor(self.labels).tolist()
        if self.read:
            self.samples = np.asarray(self.samples)
        if len(self.samples) != len(self):
            raise ValueError(
                f"a label is needed for each of {len(self.samples)} samples, not {len(self)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        samples, labels = self.__getitems__([index])
        return samples[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        labels = torch.tensor([self.labels[index] for index in indices])
        if self.read is None:
            return self.samples[indices], labels
        return torch.stack([self._read(path) for path in self.samples[indices].tolist()]), labels

    def _read(self, path: str) -> Tensor:
        try:
            return self.read(path)  # type: ignore[misc]
        except Exception as error:  # each format has errors of its own for a damaged file
            how = f"cannot be read ({type(error).__name__}: {error})"
            raise OSError(f"{path} {how}; {self.remedy}") from error

    def check(self) -> None:
        """Look at the head of each file, before one of them stops a training."""
        wrong: dict[str, Exception] = {}
        for path in self.samples.tolist() if self.look else ():
            try:
                self.look(path)  # type: ignore[misc]
            except Exception as error:  # as above
                wrong[path] = error
        if wrong:
            names, why = [*wrong], next(iter(wrong.values()))
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            raise OSError(
                f"{len(names)} of {len(self)} files cannot be read: {', '.join(names[:10])}{more} "
                f"({type(why).__name__}: {why}); of each: {self.remedy}"
            )

    def identity(self) -> bytes:
        """Bytes that differ where samples differ."""
        if self.read is None:
            return self.samples.numpy().tobytes() + np.array(self.labels).tobytes()
        paths = self.samples.tolist()
        start = len(commonpath(paths))  # the same data elsewhere are the same
        names = [(path[start:], Path(path).stat().st_size) for path in paths]
        # Raw images of one size have one length, and a crop changes none: some are read.
        some = paths[:: max(len(paths) // 64, 1)]
        seen = [hashlib.sha256(self._read(path).numpy().tobytes()).hexdigest() for path in some]
        return repr((names, self.labels, seen)).encode()

    def subset(self, indices: Iterable[int]) -> Self:
        """The samples at these indices, in this order."""
        chosen = [*indices]
        labels = [self.labels[index] for index in chosen]
        return replace(self, samples=self.samples[chosen], labels=labels)

    def interleave(self) -> Self:
        """Reorder the samples so that every part holds the classes in their proportions."""
        return self.subset(self._interleave(range(len(self))))

    def draw(self, n: int, seed: int) -> tuple[Self, Self]:
        """Draw ``n`` samples; all others, and those drawn, each in their order.

        Both parts hold the classes in their proportions.
        """
        generator = torch.Generator().manual_seed(seed)
        order = self._interleave(torch.randperm(len(self), generator=generator).tolist())
        return self.subset(sorted(order[n:])), self.subset(sorted(order[:n]))

    def hold_out(self, share: float) -> tuple[Self, Self]:
        """Split for training and testing: the last ``share`` of each class is for testing.

        Each class has at least one sample in both.
        """
        train, test = [], []
        for members in self._by_class(range(len(self))):
            n = len(members)
            if n == 1:
                raise ValueError(
                    f"{self.samples[members[0]]} is the only file of its class, which needs one "
                    "for training and one for testing; add another"
                )
            first = n - min(max(round(n * share), 1), n - 1)
            train += members[:first]
            test += members[first:]
        return self.subset(train), self.subset(test)

    def _interleave(self, order: Iterable[int]) -> list[int]:
        # Samples at equal positions stay in the order of their classes' first samples.
        position = {i: (n + 0.5) / len(m) for m in self._by_class(order) for n, i in enumerate(m)}
        return sorted(position, key=position.__getitem__)

    def _by_class(self, order: Iterable[int]) -> Iterable[list[int]]:
        """The indices of each class, in the order given."""
        classes = defaultdict(list)
        for index in order:
            classes[self.labels[index]].append(index)
        return classes.values()
