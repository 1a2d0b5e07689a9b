"""Samples and their labels, in memory or in files, and draws that keep the classes' proportions."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset, default_collate

Batch = tuple[Tensor, Tensor]


class Samples(Dataset):
    """Samples whose labels are known before they are read."""

    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Sequence[int]) -> Self:
        raise NotImplementedError

    def identity(self) -> bytes:
        """Bytes that differ where samples differ."""
        raise NotImplementedError

    def interleave(self) -> Self:
        """Reorder the samples so that every part holds the classes in their proportions."""
        return self.subset(self._interleave(range(len(self))))

    def draw(self, n: int, seed: int) -> tuple[list[int], list[int]]:
        """Draw ``n`` samples; the sorted indices of all others, and of those drawn.

        Both parts hold the classes in their proportions.
        """
        generator = torch.Generator().manual_seed(seed)
        order = self._interleave(torch.randperm(len(self), generator=generator).tolist())
        return sorted(order[n:]), sorted(order[:n])

    def _interleave(self, order: Iterable[int]) -> list[int]:
        # Samples at equal positions stay in the order of their classes' first samples.
        position = {i: (n + 0.5) / len(m) for m in self._by_class(order) for n, i in enumerate(m)}
        return sorted(position, key=position.__getitem__)

    def _by_class(self, order: Iterable[int]) -> Iterable[list[int]]:
        """The indices of each class, in the order given."""
        labels, classes = self.labels, defaultdict(list)
        for index in order:
            classes[labels[index]].append(index)
        return classes.values()


class InMemory(Samples, TensorDataset):
    """Samples ``[n, ...]`` and labels ``[n]``; a batch is fetched by one indexing.

    Raises:
        ValueError: more or fewer labels than samples.
    """

    def __init__(self, *tensors: Tensor) -> None:
        samples, labels = map(len, tensors[:2])
        if samples != labels:
            raise ValueError(f"a label is needed for each of {samples} samples, not {labels}")
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
    """Samples in a file each, read when they are asked for.

    Args:
        paths: the files.
        labels: a class for each.
        read: reads a file as a tensor.
        remedy: what to do about a file that cannot be read.

    Raises:
        OSError: a file that ``read`` cannot read, when it is asked for.
    """

    paths: list[str]
    labels: list[int]
    read: Callable[[str], Tensor]
    remedy: str

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.paths[index]
        try:
            return self.read(path), self.labels[index]
        except Exception as error:  # each format has errors of its own for a damaged file
            how = f"cannot be read ({type(error).__name__}: {error})"
            raise OSError(f"{path} {how}; {self.remedy}") from error

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        return default_collate([self[index] for index in indices])

    def subset(self, indices: Sequence[int]) -> Self:
        paths, labels = [self.paths[i] for i in indices], [self.labels[i] for i in indices]
        return type(self)(paths, labels, self.read, self.remedy)

    def hold_out(self, share: float) -> tuple[Self, Self]:
        """Split for training and testing: the last ``share`` of each class is for testing.

        Each class has at least one file in both.
        """
        train, test = [], []
        for members in self._by_class(range(len(self))):
            n = len(members)
            if n == 1:
                raise ValueError(
                    f"{self.paths[members[0]]} is the only file of its class, which needs one for "
                    "training and one for testing; add another"
                )
            first = n - min(max(round(n * share), 1), n - 1)
            train += members[:first]
            test += members[first:]
        return self.subset(train), self.subset(test)

    def identity(self) -> bytes:
        start = len(commonpath(self.paths or [""]))  # the same data elsewhere are the same
        names = [(path[start:], Path(path).stat().st_size) for path in self.paths]
        # Raw images of one size have one length, and a crop changes none: some are read.
        some = range(0, len(self), max(len(self) // 64, 1))
        seen = [hashlib.sha256(self[index][0].numpy().tobytes()).hexdigest() for index in some]
        return repr((names, self.labels, seen)).encode()
