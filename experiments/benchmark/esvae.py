"""Where an epoch of the sharp ESVAE goes: a training step of its recipe, and of others beside it.

    python experiments/benchmark/esvae.py

writes ``esvae.csv`` and ``esvae.png``: ``experiment=mnist_esvae_sharp`` as its config has it, and
with one thing changed, on a CPU; each as milliseconds for each image, loading apart. Then where
the recipe's own step goes, by kind of operator, and what loading takes.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from common import CPU, interleave, parser, write_csv
from fsvae import by_kind
from hydra.utils import instantiate
from loading import Memory
from matplotlib.figure import Figure

from sj_taid.training.allocator import reuse_freed_memory
from sj_taid.training.composing import compose
from sj_taid.training.plot import save

RECIPE_OF = "experiment=mnist_esvae_sharp"
RECIPE = "as configured"
CHANNELS_FIRST = "channels first"  # which no config says
#: what is changed -> overrides
VARIANTS = {
    RECIPE: [],
    "bfloat16": ["trainer.precision=bf16-mixed"],
    CHANNELS_FIRST: [],
    "batch of 128": ["dataset.batch_size=128"],
    "batch of 256": ["dataset.batch_size=256"],
    "fixed decoder": ["decoder=fixed"],
    "published decoder layers": ["model.subpixel=false"],
    "ALIF, torch backend": ["neuron.backend=torch"],
    "SpikingJelly LIF": ["neuron=lif"],
    "SpikingJelly PLIF": ["neuron=plif"],
}


def training_step(name: str, extra: Sequence[str]) -> tuple[Callable[[], None], int]:
    """A step of a variant, on random images, and its batch."""
    cfg = compose("train", [RECIPE_OF, *VARIANTS[name], *extra])
    torch.manual_seed(0)
    layout = torch.contiguous_format if name == CHANNELS_FIRST else torch.channels_last
    model = instantiate(cfg.model).to(memory_format=layout)
    optimizer = instantiate(cfg.optimizer)(model.parameters())
    size = cfg.dataset.image_size
    image = torch.rand(cfg.dataset.batch_size, cfg.dataset.channels, size, size) * 2 - 1
    bfloat16 = cfg.trainer.precision == "bf16-mixed"

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model.training_loss(image)["loss"]
        loss.backward()
        optimizer.step()

    return step, len(image)


def loader(extra: Sequence[str]) -> Callable[[], object]:
    """Gives the recipe's next batch, epoch after epoch."""
    cfg = compose("train", [RECIPE_OF, *extra]).dataset
    options = {key: cfg[key] for key in ("name", "channels", "image_size", "batch_size")}
    data = Memory(Path(), 6000, **options)
    data.setup()
    batches = itertools.chain.from_iterable(itertools.repeat(data.train_dataloader()))
    return lambda: next(batches)


def draw(table: pd.DataFrame, path: Path) -> None:
    figure = Figure((11, 3.6), layout="constrained")
    steps, where = figure.subplots(1, 2)
    rows = table[table["ratio"].notna()]
    bars = steps.barh(rows["work"], rows["ms_per_image"], color="tab:blue")
    steps.bar_label(bars, [f" {ratio:.2f}x" for ratio in rows["ratio"]], fontsize=8)
    steps.margins(x=0.15)
    steps.invert_yaxis()
    steps.set(xlabel="ms for each image (median)", title="a training step of ESVAE")
    left = 0.0
    for row in table[table["ratio"].isna()].itertuples():
        where.barh([RECIPE], row.ms_per_image, left=left, label=row.work)
        left += row.ms_per_image
    where.set(xlabel="ms for each image", title="where it goes (profiled, and loading)")
    where.margins(y=0.6)
    where.legend(fontsize=8, ncols=3)
    save(figure, path, dpi=120)


def main(arguments: Sequence[str] | None = None, extra: Sequence[str] = ()) -> None:
    """``extra`` are overrides for all variants."""
    made = parser(__doc__, repeats=5)
    made.set_defaults(device=CPU)
    options = made.parse_args(arguments)
    if options.device != CPU:
        made.error(f"the recipe is for a CPU, but --device is {options.device}")
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    variants = {name: training_step(name, extra) for name in VARIANTS}
    steps = {name: step for name, (step, _) in variants.items()}
    batches = {name: batch for name, (_, batch) in variants.items()}
    timings = interleave(steps, options.repeats)
    first = timings[RECIPE].median_ms / batches[RECIPE]
    rows: list[dict[str, Any]] = [
        {"work": name, "batch": batches[name], **timing._asdict()}
        | {"ms_per_image": (each := timing.median_ms / batches[name]), "ratio": each / first}
        for name, timing in timings.items()
    ]
    batch = batches[RECIPE]
    loading = interleave({"loading": loader(extra)}, 10 * options.repeats)
    parts = by_kind(steps[RECIPE]) | {"loading": loading["loading"].median_ms}
    rows += [
        {"work": kind, "batch": batch, "median_ms": spent, "ms_per_image": spent / batch}
        for kind, spent in parts.items()
    ]
    table = write_csv(rows, options.out / "esvae.csv")
    print(table.iloc[:, :7].to_string())
    draw(table, options.out / "esvae.png")


if __name__ == "__main__":
    main()
