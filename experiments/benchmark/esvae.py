"""Time of a training step of the sharp ESVAE on a CPU, and of variants of it.

    python experiments/benchmark/esvae.py

writes ``esvae.csv``: ``experiment=mnist_esvae_sharp`` as configured, and with one choice changed,
in milliseconds per image without loading.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import CPU, autocast, interleave, parser, write_csv
from hydra.utils import instantiate
from omegaconf import DictConfig

from sj_taid.training.config import compose
from sj_taid.training.process import reuse_freed_memory
from sj_taid.training.run import build_model

RECIPE_OF = "experiment=mnist_esvae_sharp"
RECIPE = "as configured"
#: name -> overrides
VARIANTS = {
    RECIPE: [],
    "bfloat16": ["trainer.precision=bf16-mixed"],
    "batch of 128": ["dataset.batch_size=128"],
    "batch of 256": ["dataset.batch_size=256"],
    "fixed decoder": ["decoder=fixed"],
    "published decoder layers": ["model.subpixel=false"],
    "ALIF, torch backend": ["neuron.backend=torch"],
    "SpikingJelly LIF": ["neuron=lif"],
    "SpikingJelly PLIF": ["neuron=plif"],
}


def main(arguments: Sequence[str] | None = None, extra: Sequence[str] = ()) -> None:
    """``extra`` are overrides for all variants."""
    options = parser(__doc__, repeats=5, device=False).parse_args(arguments)
    reuse_freed_memory()
    configs = {name: compose("train", [RECIPE_OF, *v, *extra]) for name, v in VARIANTS.items()}
    table = interleave({n: train_step(cfg) for n, cfg in configs.items()}, options.repeats)
    table["batch"] = [cfg.dataset.batch_size for cfg in configs.values()]
    table["ms_per_image"] = table["median_ms"] / table["batch"]
    table["ratio"] = table["ms_per_image"] / table["ms_per_image"][RECIPE]
    write_csv(table.rename_axis("work").reset_index(), options.out / "esvae.csv")


def train_step(cfg: DictConfig) -> Callable[[], None]:
    """A function that trains a config's generator for a step on random images."""
    torch.manual_seed(0)
    model: Any = build_model(cfg)
    optimizer = instantiate(cfg.optimizer)(model.parameters())
    size = cfg.dataset.image_size
    images = torch.rand(cfg.dataset.batch_size, cfg.dataset.channels, size, size) * 2 - 1
    dtype = "bfloat16" if cfg.trainer.precision == "bf16-mixed" else "float32"

    def step() -> None:
        optimizer.zero_grad()
        with autocast(CPU, dtype):
            loss = model.training_loss(images)["loss"]
        loss.backward()
        optimizer.step()

    return step


if __name__ == "__main__":
    main()
