"""Does loading keep up with training? Samples per second of the loaders and of a training step.

    python experiments/benchmark/loading.py

writes ``loading.csv`` and ``loading.png``.

Each loader is timed with and without augmentation, with no process of its own and with two, on
made-up data of the true kind: images in memory, photographs of CelebA's size in JPEG files, and
recordings as the files of frames that SpikingJelly leaves. Beside it stands the training step,
forward and backward, of the paper's nets for such data. A loader without processes takes its time
from the training; processes work beside it, on cores of their own if the machine has them.
"""

import argparse
import itertools
import os
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from common import interleave, parser, write_csv
from fsvae import train_step as fsvae_step
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from sj_taid.data import Data, Files, ImageData, ImageFolder, InMemory
from sj_taid.data.event import EventData, read_frames
from sj_taid.model import FSVAE, Classifier
from sj_taid.training.allocator import reuse_freed_memory
from sj_taid.training.plot import save

MARKERS = {0: "o", 2: "s"}  # by the number of a loader's processes
T = 20  # frames of a recording
LOADER, STEP = "loader", "training step"
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
    """Pieces, of CelebA's size, of the two photographs that scikit-learn ships."""

    def __init__(self, folder: Path, count: int, **options: Any) -> None:
        super().__init__(root=folder, **options)
        random = np.random.default_rng(0)
        photographs = load_sample_images().images  # 427x640
        for i in range(count):
            top, left = random.integers(427 - 218), random.integers(640 - 178)
            piece = Image.fromarray(photographs[i % 2][top : top + 218, left : left + 178])
            piece.save(folder / f"{i:04}.jpg", quality=90)


class Recordings(EventData):
    """Files of frames with as many events as the true ones, around a spot that wanders."""

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


def plif_net(data: Data, batch: int, device: torch.device, stages: Sequence[Sequence[int]]) -> Step:
    frames = (T,) if isinstance(data, EventData) else ()
    shape = (*frames, batch, data.channels, data.image_size, data.image_size)
    model = Classifier(data.channels, data.image_size, stages=stages).to(device)
    x, target = torch.rand(shape, device=device), torch.zeros(batch, model.classes, device=device)

    def step() -> None:
        model.zero_grad()
        F.mse_loss(model(x), target).backward()

    return step


class Case(NamedTuple):
    make: Callable[..., Data]
    samples: int  # per epoch
    channels: int
    image_size: int
    augment: str
    nets: dict[str, tuple[Callable[..., Step], int]]  # what trains on it, and the batch for that


FSVAE_STEP = {"FSVAE": (fsvae, 16)}


def plif(stages: Sequence[Sequence[int]], batch: int) -> dict[str, tuple[Callable[..., Step], int]]:
    return {"PLIF-net": (partial(plif_net, stages=stages), batch)}


#: Nets of the paper; their batches fit the memory of a small machine.
CASES = {
    "MNIST: 1x32x32, in memory": Case(
        Memory, 20_000, 1, 32, "affine", FSVAE_STEP | plif([[128], [128]], 16)
    ),
    "CIFAR10: 3x32x32, in memory": Case(
        Memory, 20_000, 3, 32, "crop_flip", FSVAE_STEP | plif([[256] * 3] * 2, 4)
    ),
    "CelebA: JPEG files to 3x64x64": Case(Photographs, 500, 3, 64, "flip", FSVAE_STEP),
    "N-MNIST: files of 20x2x34x34": Case(
        partial(Recordings, events=4_000), 500, 2, 34, "affine", plif([[128]] * 2, 8)
    ),
    "DVS128 Gesture: files of 20x2x128x128": Case(
        partial(Recordings, events=350_000), 64, 2, 128, "affine", plif([[128]] * 5, 2)
    ),
}


def time_case(name: str, case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the loaders and the training steps of a case in turn."""
    with tempfile.TemporaryDirectory() as folder:
        data = case.make(
            Path(folder),
            case.samples,
            name=name,
            channels=case.channels,
            image_size=case.image_size,
            batch_size=options.batch,
        )
        data.setup()
        rows: dict[str, dict[str, Any]] = {}
        work: dict[str, Callable[[], object]] = {}
        for data.augment, data.num_workers in itertools.product((None, case.augment), MARKERS):
            loader = data.train_dataloader()
            key = f"{data.augment}, {data.num_workers} processes"
            rows[key] = {"work": LOADER, "augment": data.augment, "processes": data.num_workers}
            rows[key]["samples"] = len(loader) * options.batch
            work[key] = partial(deque, loader, maxlen=0)  # runs through it
        for net, (make, batch) in case.nets.items():
            rows[net] = {"work": STEP, "net": net, "samples": batch}
            work[net] = make(data, batch, options.device)
        timings = interleave(work, options.repeats, options.device)
    for key, row in rows.items():
        row["data"] = name
        row |= zip(RATES, (row["samples"] / ms * 1e3 for ms in timings[key]), strict=True)
        print(f"{name:38} {key:24} {row[RATES[0]]:10.1f} samples per second")
    return list(rows.values())


def draw(table: pd.DataFrame, path: Path) -> None:
    names = list(table["data"].unique())
    table = table.assign(y=table["data"].map(names.index), x=table[RATES[0]])
    figure = Figure((9, 1.2 + 0.8 * len(names)), layout="constrained")
    axis = figure.subplots()
    loaders, steps = (table[table["work"] == work] for work in (LOADER, STEP))
    for (processes, marker), augmented in itertools.product(MARKERS.items(), (False, True)):
        rows = loaders[
            (loaders["processes"] == processes) & (loaders["augment"].notna() == augmented)
        ]
        face = "white" if augmented else "tab:blue"
        label = f"loader, {processes} processes" + (", augmented" if augmented else "")
        axis.plot("x", "y", marker, data=rows, color="tab:blue", mfc=face, label=label)
    axis.plot(steps["x"], steps["y"], "x", color="tab:red", label="training step")
    for row in steps.itertuples():
        # Two names on one line do not meet.
        y, side = (row.y - 0.1, "bottom") if row.net == "FSVAE" else (row.y + 0.1, "top")
        axis.text(row.x, y, row.net, ha="center", va=side, fontsize=8)
    axis.margins(x=0.1)
    axis.set_xscale("log")
    axis.set_yticks(range(len(names)), names)
    axis.set(ylim=(len(names) - 0.4, -0.6), xlabel="samples per second (median)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    save(figure, path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, repeats=5)
    made.add_argument("--batch", type=int, default=16, help="of the loaders")
    options = made.parse_args(arguments)
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    cores = os.cpu_count()
    shared = {"device": str(options.device), "batch": options.batch, "cores": cores}
    rows = [row | shared for name, case in CASES.items() for row in time_case(name, case, options)]
    draw(write_csv(rows, options.out / "loading.csv"), options.out / "loading.png")


if __name__ == "__main__":
    main()
