"""Image decoders that tell what attention adds to a gain, and the comparison of their runs.

``PYTHONPATH=experiments sj-taid train decoder._target_=attention.Gain trust=[attention.Gain]``
takes one of them. ``python experiments/attention.py RUN...`` adds finished runs to
``results/attention_runs.csv``; RESULTS has what they are compared by.
"""

import argparse
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sj_taid import TAID, FixedDecoder
from sj_taid._internal.context import seeded
from sj_taid.training.checkpoint import load_weights, read_checkpoint
from sj_taid.training.config import key_of
from sj_taid.training.evaluate import evaluated_config
from sj_taid.training.files import atomic_write
from sj_taid.training.parts import build_parts
from sj_taid.training.run import Run

RUNS = Path(__file__).resolve().parents[1] / "results" / "attention_runs.csv"
#: The arms by what their commands choose; the last that fits.
ARMS = {
    "decoder=fixed": "fixed",
    "decoder.decay=1": "mean",
    "decoder._target_=attention.Gain": "gain",
    "decoder._target_=attention.Steps": "steps",
    "decoder._target_=attention.Attention": "taid",
    "+decoder.scale=0.25": "taid, sum 1",
}
#: A validation each so many updates.
EVERY = 500
#: Where data lie changes no run.
UNTOLD = {"dataset.root", "metric.published_autoencoders", "cache_dir", "hydra.run.dir"}


class Gain(FixedDecoder):
    """FSVAE's weights times one learned number, which starts at 1."""

    def __init__(self, T: int, **options: Any) -> None:
        super().__init__(T, **options)
        self.gain = nn.Parameter(torch.ones(()))

    def attention(self, x_seq: Tensor) -> Tensor:
        return self.gain * super().attention(x_seq)


class Steps(FixedDecoder):
    """A learned weight for each time step, the same for every input, which starts as FSVAE's."""

    def __init__(self, T: int, **options: Any) -> None:
        super().__init__(T, **options)
        self.weights = nn.Parameter(super().attention(torch.zeros(T, 1, 1)))

    def attention(self, x_seq: Tensor) -> Tensor:
        self._check(x_seq)
        return self.weights


class Attention(TAID):
    """TAID times ``scale``: with 2 / T the weights start at a sum near 1.

    Its start is drawn apart, so that all random numbers after it are those of the other decoders.
    """

    def __init__(self, T: int, scale: float = 1.0, **options: Any) -> None:
        with seeded(torch.initial_seed()):
            super().__init__(T, **options)
        self.scale = scale

    def attention(self, x_seq: Tensor) -> Tensor:
        return self.scale * super().attention(x_seq)


def refit(
    model: Callable[[Tensor], Tensor],
    train: Iterable[Tensor],
    test: Iterable[Tensor],
) -> dict[str, float]:
    r"""The mean squared error of ``gain * model(x) + offset`` on ``test``.

    Gain and offset are those of least squares on ``train``, in closed form.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    for x in train:
        y = model(x).double()
        x = x.double()
        sums += torch.stack(
            [y.new_tensor(y.numel()), y.sum(), x.sum(), (y * y).sum(), (x * y).sum()]
        )
    n, y_sum, x_sum, yy, xy = sums.tolist()
    gain = (xy - x_sum * y_sum / n) / (yy - y_sum * y_sum / n)
    offset = (x_sum - gain * y_sum) / n
    squares, count = 0.0, 0
    for x in test:
        squares += (gain * model(x).double() + offset - x.double()).square().sum().item()
        count += x.numel()
    return {"gain": gain, "offset": offset, "error_refitted": squares / count}


@torch.no_grad()
def measure(folder: Path) -> dict[str, Any]:
    """The row of a finished run."""
    run = Run.find(folder)
    metrics, checkpoint = run.metrics, read_checkpoint(run.checkpoint)
    parts = build_parts(evaluated_config(OmegaConf.create({"checkpoint": str(folder)}), run))
    load_weights(parts.model, checkpoint, run.checkpoint)
    model, data = parts.model.eval(), parts.load_data()
    images = [[x for x, _ in data.loader(part)] for part in (data.train_set, data.test_set)]
    with seeded(parts.seed):
        refitted = refit(lambda x: model(x).image, *images)
    epochs = checkpoint["callbacks"]["History"]["epochs"]
    errors = [epoch[key] for epoch in epochs if (key := "val/reconstruction") in epoch]
    words = [word for word in shlex.split(metrics["command"]) if key_of(word) not in UNTOLD]
    names = [name for word, name in ARMS.items() if word in words]
    return {
        "decoder": names[-1],
        "seed": metrics["seed"],
        **{f"error_{EVERY * (k + 1)}": error for k, error in enumerate(errors)},
        **refitted,
        **{name: metrics[name] for name in ("fad", "fad_published", "epochs", "commit", "machine")},
        "command": shlex.join(words),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Add finished runs to the comparison.")
    parser.add_argument("runs", nargs="+", type=Path)
    rows = pd.DataFrame([measure(run) for run in parser.parse_args(arguments).runs])
    if RUNS.exists():
        rows = pd.concat([pd.read_csv(RUNS), rows])
    rows = rows.drop_duplicates(["decoder", "seed"], keep="last").sort_values(["decoder", "seed"])
    with atomic_write(RUNS) as temporary:
        rows.to_csv(temporary, index=False)


if __name__ == "__main__":
    main()
