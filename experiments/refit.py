"""Fit the flow of a model that comes with the package again, as runs on its data set.

    python experiments/refit.py NAME FOLDER dataset.root=DATA [--seeds 0 1]

writes a run into ``FOLDER/NAME-SEED`` for each seed of the fit. ``sj-taid evaluate``,
``experiments/measure.py`` and :func:`sj_taid.pretrained.save_model` make a model of it again. The
net stays as it was trained, in the float16 that it is stored in.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sj_taid.pretrained import create_model, list_models, read_config
from sj_taid.training.checkpoint import AtomicCheckpointIO
from sj_taid.training.compare import OF_SAMPLES
from sj_taid.training.config import compose
from sj_taid.training.process import provenance, reuse_freed_memory
from sj_taid.training.run import Run, build_data

#: the metrics of the samples, which are others after the fit
STALE = {
    f"{name}{ending}"
    for name in (*OF_SAMPLES, "fad_precision", "fad_recall", "sample_variance")
    for ending in ("", "_median", "_range")
} | {"validation_fad"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "name", help="an ESVAE with a flow: of sj_taid.list_models(), or a folder of save_model"
    )
    parser.add_argument("folder", type=Path, help="for the runs")
    parser.add_argument("overrides", nargs="*", help="of the run, such as dataset.root=DATA")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the fits")
    options = parser.parse_args(arguments)
    reuse_freed_memory()
    described = read_config(options.name)
    metrics = {k: value for k, value in described["metrics"].items() if k not in STALE}
    cfg = compose("train", [*metrics["overrides"], *options.overrides])
    # the model as it is described: its surrogate may have another name now
    cfg.model = described["model"] | {"flow_epochs": cfg.model.flow_epochs}
    model: Any = create_model(options.name, pretrained=True)
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    data = build_data(cfg)
    model.flow_epochs = cfg.model.flow_epochs
    name = Path(options.name).name
    words = [options.name if options.name in list_models() else "MODEL", "FOLDER"]  # no local paths
    words += [override for override in options.overrides if "/" not in override]
    origin = {key: metrics[key] for key in ("choices", "overrides", "command")}
    for seed in options.seeds:
        images = (image for image, _ in data.plain_train_dataloader())
        model.fit_prior(images, data.train_set.labels, data.mirrors, seed)
        run = Run(options.folder / f"{name}-{seed}")
        run.begin(cfg, origin | provenance())
        state = {f"model.{key}": value for key, value in model.state_dict().items()}
        thresholds = described.get("fixed_thresholds", {})
        checkpoint = {"state_dict": state, "fixed_thresholds": thresholds}
        AtomicCheckpointIO().save_checkpoint(checkpoint, run.checkpoint)
        command = " ".join(["python experiments/refit.py", *words, f"--seeds {seed}"])
        fitted = {"command": command, "seed": seed, **provenance()}
        fitted["epochs"] = cfg.model.flow_epochs
        run.save_metrics(metrics | {"prior_fitted": fitted})
        print(run.folder)


if __name__ == "__main__":
    main()
