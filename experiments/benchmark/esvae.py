"""Time of a training step of the sharp ESVAE on a CPU, and of variants of it.

    python experiments/benchmark/esvae.py

writes ``esvae.csv``: ``experiment=mnist_esvae_sharp`` as configured, and with one choice changed,
in milliseconds per image without loading.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import CPU, interleave, parser, write_csv
from hydra.utils import instantiate

from sj_taid.training.allocator import reuse_freed_memory
from sj_taid.training.config import compose

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


def training_step(name: str, extra: Sequence[str]) -> tuple[Callable[[], None], int]:
    """A function that trains a variant for a step on random images, and its batch size."""
    cfg = compose("train", [RECIPE_OF, *VARIANTS[name], *extra])
    torch.manual_seed(0)
    model = instantiate(cfg.model).to(memory_format=torch.channels_last)
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


def main(arguments: Sequence[str] | None = None, extra: Sequence[str] = ()) -> None:
    """``extra`` are overrides for all variants."""
    options_parser = parser(__doc__, repeats=5)
    options_parser.set_defaults(device=CPU)
    options = options_parser.parse_args(arguments)
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
    print(write_csv(rows, options.out / "esvae.csv").iloc[:, :7].to_string())


if __name__ == "__main__":
    main()
