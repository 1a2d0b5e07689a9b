"""Does loading keep up with training? Samples a second of the loaders and of a training step.

    python experiments/benchmark/loading.py --out results/

Each loader is timed with and without augmentation, with no process of its own and with two, on
made-up data of the true kind: images in memory, photographs of CelebA's size in JPEG files, and
recordings as the files of frames that SpikingJelly leaves. Beside it stands the training step,
forward and backward, of the paper's nets for such data. A loader without processes takes its time
from the training; processes work beside it, on cores of their own if the machine has them.
"""

from __future__ import annotations

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
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from experiments.benchmark.fsvae import train_step as fsvae_step
from experiments.benchmark.measure import interleaved, write_csv
from sj_taid.data.base import Data, Files, InMemory
from sj_taid.data.event import EventData, read_frames
from sj_taid.data.folder import ImageFolder
from sj_taid.data.image import ImageData
from sj_taid.model import FSVAE, Classifier
from sj_taid.training.allocator import reuse_freed_memory
from sj_taid.training.plot import plt, save

WORKERS = (0, 2)
T = 20  # frames of a recording
LOADER, STEP = "loader", "training step"
RATES = ("samples_a_second", "q80_samples_a_second", "q20_samples_a_second")  # as Timing's times
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
        super().__init__(str(folder), **options)
        random = np.random.default_rng(0)
        photographs = load_sample_images().images  # 427x640
        for i in range(count):
            top, left = random.integers(427 - 218), random.integers(640 - 178)
            piece = Image.fromarray(photographs[i % 2][top : top + 218, left : left + 178])
            piece.save(folder / f"{i:04}.jpg", quality=90)


class Recordings(EventData):
    """Files of frames with as many events as the true ones, around a spot that wanders."""

    def __init__(self, folder: Path, count: int, events: int, **options: Any) -> None:
        super().__init__(str(folder), T, **options)
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
    count: int  # samples an epoch
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


def measure(name: str, case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time the loaders and the training steps of a case in turn."""
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        data = case.make(
            Path(folder),
            case.count,
            name=name,
            channels=case.channels,
            image_size=case.image_size,
            batch_size=options.batch,
        )
        data.setup()
        rows, work = {}, {}
        for data.augment in (None, case.augment):
            for data.num_workers in WORKERS:
                loader = data.train_dataloader()
                key = f"{data.augment}, {data.num_workers} processes"
                rows[key] = {"work": LOADER, "augment": data.augment, "processes": data.num_workers}
                rows[key]["samples"] = len(loader) * options.batch
                work[key] = partial(deque, loader, maxlen=0)  # runs through it
        for net, (make, batch) in case.nets.items():
            rows[net] = {"work": STEP, "net": net, "samples": batch}
            work[net] = synchronised(make(data, batch, device), device)
        timings = interleaved(work, options.repeats)
    for key, row in rows.items():
        row["data"] = name
        for column, milliseconds in zip(RATES, timings[key], strict=True):
            row[column] = row["samples"] / milliseconds * 1e3
        print(f"{name:38} {key:24} {row[RATES[0]]:10.1f} samples a second")
    return list(rows.values())


def synchronised(step: Step, device: torch.device) -> Step:
    def run_and_wait() -> None:
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run_and_wait


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.8 * len(names)))
    for processes, marker in zip(WORKERS, "os", strict=True):
        for augmented, face in ((False, "tab:blue"), (True, "white")):
            chosen = [
                row
                for row in rows
                if row["work"] == LOADER
                and row["processes"] == processes
                and (row["augment"] is not None) == augmented
            ]
            axis.plot(
                [row[RATES[0]] for row in chosen],
                [names.index(row["data"]) for row in chosen],
                linestyle="none",
                marker=marker,
                color="tab:blue",
                markerfacecolor=face,
                label=f"loader, {processes} processes" + (", augmented" if augmented else ""),
            )
    steps = [row for row in rows if row["work"] == STEP]
    x, y = [row[RATES[0]] for row in steps], [names.index(row["data"]) for row in steps]
    axis.plot(x, y, "x", color="tab:red", label="training step")
    for row, at in zip(steps, y, strict=True):
        above = row["net"] == "FSVAE"  # so that two names on one line do not meet
        axis.annotate(
            row["net"],
            (row[RATES[0]], at),
            xytext=(0, 6 if above else -6),
            textcoords="offset points",
            ha="center",
            va="bottom" if above else "top",
            fontsize=8,
        )
    axis.margins(x=0.1)
    axis.set_xscale("log")
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlabel("samples a second (median)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.tight_layout()
    save(figure, path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=16, help="of the loaders")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    reuse_freed_memory()

    cores = len(os.sched_getaffinity(0))
    shared = {"device": options.device, "batch": options.batch, "cores": cores}
    rows = [row for name, case in CASES.items() for row in measure(name, case, options)]
    write_csv([row | shared for row in rows], options.out / "loading.csv")
    draw(rows, options.out / "loading.png")
    print(f"CSV and picture are in {options.out}")


if __name__ == "__main__":
    main()
