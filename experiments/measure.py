"""Measure a generator's checkpoint further: ``python experiments/measure.py RUN [--draws 3]``.

The result is one more evaluation in the run's folder: ``_median`` and ``_range`` of both FADs over
several draws; ``_floor``, the metrics of training images, than which no generator can be expected
to be better; and of ESVAE ``_perfect``, those of images decoded from the rates of training images,
as if the prior were perfect.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sj_taid._context import eval_mode
from sj_taid.data import ImageData
from sj_taid.model import ESVAE
from sj_taid.model.rate import spikes_from_rate
from sj_taid.training.process import provenance
from sj_taid.training.run import Run, build_data, build_part


class TrainingImages(nn.Module):
    """In the place of a model: its samples are training images, none twice while they last."""

    def __init__(self, data: ImageData) -> None:
        super().__init__()
        self.loader: Any = data.plain_train_dataloader()
        generator = torch.Generator().manual_seed(0)
        self.order = cycle(torch.randperm(len(data.train_set), generator=generator).tolist())

    def sample(self, n: int) -> Tensor:
        batch = self.loader.dataset.__getitems__([*islice(self.order, n)])
        return self.loader.collate_fn(batch)[0]


class PerfectPrior(TrainingImages):
    """ESVAE with the rates of training images in the place of a prior's."""

    def __init__(self, data: ImageData, model: ESVAE) -> None:
        super().__init__(data)
        self.model = model

    def sample(self, n: int) -> Tensor:
        model = self.model
        images = super().sample(n).to(next(self.parameters()).device)
        with eval_mode(model), torch.no_grad():
            return model.decode(spikes_from_rate(model.rate(images), model.T))


def measure(run: Run, draws: int, trust: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The metrics, and how each was measured."""
    cfg = run.config
    cfg.trust = [*trust]
    model: Any = run.model(trust)
    data, evaluator = build_data(cfg), build_part(cfg, "metric")
    if evaluator is None:
        raise ValueError(f"{run.folder} holds no generator")
    metrics: dict[str, Any] = {}
    protocol: dict[str, str] = {}
    drawn = [
        replace(evaluator, seed=cfg.seed + draw).evaluate_samples(model, data)
        for draw in range(draws)
    ]
    for name in {"fad", "fad_published"} & drawn[0].keys():
        values = [one[name] for one in drawn]
        metrics |= {f"{name}_median": median(values), f"{name}_range": max(values) - min(values)}
        how = f"{drawn[0]['protocol'][name]}, of {draws} draws"
        protocol |= {f"{name}_median": how, f"{name}_range": how}
    others = {"floor": (TrainingImages(data), "samples: training images")}
    if isinstance(model, ESVAE):
        decoded = "samples: decoded from the rates of training images"
        others["perfect"] = PerfectPrior(data, model), decoded
    for ending, (source, what) in others.items():
        found = evaluator.evaluate_samples(source, data)
        for name, how in found.pop("protocol").items():
            metrics[f"{name}_{ending}"] = found[name]
            protocol[f"{name}_{ending}"] = f"{how}, {what}"
    return metrics, protocol


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, or a checkpoint in it")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--trust", nargs="+", default=(), help="custom classes that the run names")
    options = parser.parse_args(arguments)
    run = Run.find(options.run)
    with run.lock():
        metrics, protocol = measure(run, options.draws, options.trust)
        evaluation = {"metrics": metrics, "protocol": protocol, "seed": run.config.seed}
        command = {"command": f"python experiments/measure.py RUN --draws {options.draws}"}
        sha256 = {"checkpoint_sha256": run.checkpoint_sha256()}
        print(run.save_evaluation(evaluation | sha256 | command | provenance()))


if __name__ == "__main__":
    main()
