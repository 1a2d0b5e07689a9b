"""Time of a training step of the sharp ESVAE on a CPU, and of variants of it.

    python experiments/benchmark/esvae.py

writes ``esvae.csv``: ``experiment=mnist_esvae_sharp`` as configured, and with one choice changed,
in milliseconds per image without loading.
"""

from collections.abc import Sequence
from typing import Any

import torch
from common import interleave, parser, training_step, write_csv

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


def main(arguments: Sequence[str] | None = None, extra: Sequence[str] = ()) -> None:
    """``extra`` are overrides for all variants."""
    options_parser = parser(__doc__, repeats=5, device=False)
    options = options_parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    reuse_freed_memory()
    configs = {name: compose("train", [RECIPE_OF, *v, *extra]) for name, v in VARIANTS.items()}
    batches = {name: cfg.dataset.batch_size for name, cfg in configs.items()}
    steps = {name: training_step(cfg, batches[name]) for name, cfg in configs.items()}
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
