"""Samples per second of the data loaders and of the training steps that they feed.

    python experiments/benchmark/loading.py

writes ``loading.csv``. Each loader augments, in the main process and with two workers, synthetic
data of the real kind: images in memory, photographs of CelebA's size in JPEG files, and recordings
as files of frames, as SpikingJelly writes them. The training step is that of the paper's net.
"""

import argparse
import os
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import interleave, parser, write_csv
from fsvae import train_step as fsvae_step
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from sj_taid.data import Data, Files, ImageData, ImageFolder, InMemory
from sj_taid.data.event import EventData, read_frames
from sj_taid.model import FSVAE, Classifier
from sj_taid.training.allocator import reuse_freed_memory

PROCESSES = (0, 2)
T = 20  # frames per recording
RATES = ("samples_per_second", "p80_samples_per_second", "p20_samples_per_second")  # as Timing's
Step = Callable[[], None]


class Memory(ImageData):
    """Random images in memory."""

    def __init__(self, folder: Path, count: int, **options: Any) -> None:
        super().__init__(**options)
        self.count = count

    def load(self) -> tuple[InMemory, InMemory]:
        shape = (self.count, self.channels, self.image_size, self.image_size)
        samples = InMemory(torch.randint(256, shape, dtype=torch.uint8), torch.zeros(self.count))
        return samples, samples


class Photographs(ImageFolder):
    """Crops of CelebA's size from the two photographs that scikit-learn ships."""

    def __init__(self, folder: Path, count: int, **options: Any) -> None:
        super().__init__(root=folder, **options)
        random = np.random.default_rng(0)
        photographs = load_sample_images().images  # 427x640
        for i in range(count):
            top, left = random.integers(427 - 218), random.integers(640 - 178)
            piece = Image.fromarray(photographs[i % 2][top : top + 218, left : left + 178])
            piece.save(folder / f"{i:04}.jpg", quality=90)


class Recordings(EventData):
    """Files of frames with as many events as real ones, around a moving spot."""

    def __init__(self, folder: Path, count: int, events: int, **options: Any) -> None:
        super().__init__(root=folder, T=T, **options)
        random = np.random.default_rng(0)
        size = self.image_size
        for i in range(count):
            t = np.arange(events) * T // events
            spot = random.uniform(0.3, 0.7, (T, 2))[t] + random.normal(0, 0.12, (events, 2))
            y, x = (spot.clip(0, 0.99) * size).astype(int).T
            frames = np.zeros((T, 2, size, size))
            np.add.at(frames, (t, random.integers(2, size=events), y, x), 1)
            np.savez_compressed(folder / f"{i:04}.npz", frames=frames)

    def load(self) -> tuple[Files, Files]:
        paths = sorted(map(str, self.root.glob("*.npz")))
        samples = Files(paths, [0] * len(paths), read_frames, "")
        return samples, samples


def fsvae(data: Data, batch: int, device: torch.device) -> Step:
    shape = (batch, data.channels, data.image_size, data.image_size)
    model = FSVAE(data.channels, data.image_size).to(device)
    return partial(fsvae_step, model, torch.rand(shape, device=device) * 2 - 1)


def plif_net(data: Data, batch: int, device: torch.device, stages: int) -> Step:
    shape = (T, batch, data.channels, data.image_size, data.image_size)
    model = Classifier(data.channels, data.image_size, stages=[[128]] * stages).to(device)
    x, target = torch.rand(shape, device=device), torch.zeros(batch, model.classes, device=device)

    def step() -> None:
        model.zero_grad()
        F.mse_loss(model(x), target).backward()

    return step


class Case(NamedTuple):
    """A kind of data, and the paper's net for it."""

    make: Callable[..., Data]
    samples: int  # per epoch
    channels: int
    image_size: int
    augment: str
    net: str
    step: Callable[..., Step]
    batch: int  # of the net, so that it fits the memory of a small machine


nmnist, gesture = (partial(Recordings, events=events) for events in (4_000, 350_000))
CASES = {
    "MNIST: 1x32x32, in memory": Case(Memory, 20_000, 1, 32, "affine", "FSVAE", fsvae, 16),
    "CIFAR10: 3x32x32, in memory": Case(Memory, 20_000, 3, 32, "crop_flip", "FSVAE", fsvae, 16),
    "CelebA: JPEG files to 3x64x64": Case(Photographs, 500, 3, 64, "flip", "FSVAE", fsvae, 16),
    "N-MNIST: files of 20x2x34x34": Case(
        nmnist, 500, 2, 34, "affine", "PLIF-net", partial(plif_net, stages=2), 8
    ),
    "DVS128 Gesture: files of 20x2x128x128": Case(
        gesture, 64, 2, 128, "affine", "PLIF-net", partial(plif_net, stages=5), 2
    ),
}


def time_case(name: str, case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the loaders and the training steps of a case in turn."""
    with tempfile.TemporaryDirectory() as folder:
        size = {"channels": case.channels, "image_size": case.image_size}
        data = case.make(Path(folder), case.samples, name=name, batch_size=options.batch, **size)
        data.setup()
        rows: list[dict[str, Any]] = []
        work: dict[str, Callable[[], object]] = {}
        data.augment = case.augment
        for data.num_workers in PROCESSES:
            loader = data.train_dataloader()
            work[str(len(rows))] = partial(deque, loader, maxlen=0)  # iterates over it
            row: dict[str, Any] = {"augment": data.augment, "processes": data.num_workers}
            rows.append({"work": "loader", "samples": len(loader) * options.batch, **row})
        work["step"] = case.step(data, case.batch, options.device)
        rows.append({"work": "training step", "net": case.net, "samples": case.batch})
        timings = interleave(work, options.repeats, options.device)
    for row, timing in zip(rows, timings.values(), strict=True):
        row["data"] = name
        row |= zip(RATES, (row["samples"] / ms * 1e3 for ms in timing), strict=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    options_parser = parser(__doc__, repeats=5)
    options_parser.add_argument("--batch", type=int, default=16, help="of the loaders")
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    cores = os.cpu_count()
    shared = {"device": str(options.device), "batch": options.batch, "cores": cores}
    rows = [row | shared for name, case in CASES.items() for row in time_case(name, case, options)]
    table = write_csv(rows, options.out / "loading.csv")
    print(table[["data", "work", "augment", "processes", RATES[0]]].to_string())


if __name__ == "__main__":
    main()
