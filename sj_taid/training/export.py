"""Export the model of a finished run.

Writes a folder for ``sj_taid.create_model``: the weights of the run's last checkpoint, or of the
one that is named, the model's config, and a card with its command and metrics.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import nn

from .. import pretrained
from .._checks import expand_home
from .._extras import needs
from ..thresholds import fixed_thresholds
from .compare import format_metrics
from .files import atomic_write
from .run import Run, remove_backends

with needs("safetensors"):
    from safetensors.torch import save

#: The Hugging Face hub reads what is between the dashes.
CARD = """\
---
license: mit
library_name: sj-taid
pipeline_tag: {pipeline}
tags: [spiking-neural-networks, spikingjelly]
---

# {name}

{kind} of sj-taid, {parameters:,} parameters; `config.json` has the commit, versions and machine.

Trained by `{command}`.{start}{fitted}{half}

```python
{imports}

import sj_taid

model = sj_taid.create_model("{name}", pretrained=True)
{usage}
```

| metric | value | protocol |
|---|---|---|
{metrics}
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("sj-taid export", description=__doc__)
    parser.add_argument("run", type=Path, help="a finished run's folder, or a checkpoint in it")
    parser.add_argument("--name", required=True, help="the model's name, and its folder's")
    parser.add_argument("--out", type=Path, default=Path(), help="parent of the folder NAME")
    parser.add_argument("--half", action="store_true", help="store the layers' weights as float16")
    options = parser.parse_args(arguments)
    folder = export(**vars(options))
    size = (folder / pretrained.WEIGHTS).stat().st_size / 1e6
    print(f"{size:.2f} MB: sj_taid.create_model({str(folder)!r}, pretrained=True)")


def export(run: str | Path, name: str, out: str | Path = ".", half: bool = False) -> Path:
    """Write the model of a run into ``out / name``, over an earlier export.

    Args:
        run: a finished run's folder, or a checkpoint in it.
        name: the model's name.
        out: parent of the model's folder.
        half: store the weights of convolutions and linear layers as float16. Biases, norms, neurons
            and buffers keep their dtype.

    Raises:
        FileNotFoundError: the run is not finished, or has no checkpoint.
        FileExistsError: the folder holds something else than an earlier export.
        ValueError: a model of custom classes, which :func:`sj_taid.create_model` would not build,
            a checkpoint that was not tested, or a name that is a path.
    """
    if len(Path(name).parts) != 1 or name in ("..", "/"):
        raise ValueError(
            f"--name must be a folder's name, not a path, but it is {name!r}; see --out"
        )
    name = Path(name).name
    folder = expand_home(out) / name
    config_file = folder / pretrained.CONFIG  # that of another program has the same name
    before = config_file.read_text("utf-8", "replace") if config_file.is_file() else ""
    is_ours = '"sha256"' in before and '"sj-taid"' in before
    if folder.is_dir() and any(folder.iterdir()) and not is_ours:
        raise FileExistsError(
            f"{folder} holds files that are no earlier export; choose another --name or --out"
        )
    finished = Run.find(run)
    is_best = finished.checkpoint == finished.best
    if not is_best and finished.checkpoint != Run(finished.folder).checkpoint:
        raise ValueError(f"{finished.checkpoint} was not tested; export the run, or its best.ckpt")
    metrics = finished.latest_metrics
    config: Any = OmegaConf.to_container(finished.config, resolve=True)
    architecture = remove_backends(config["model"])
    try:
        model = pretrained.build(architecture)  # before anything is written
    except ValueError as error:
        raise ValueError(
            f"create_model could not build this model ({error.__cause__}); others load its run by "
            "sj_taid.training.load_model(RUN, trust=[...])"
        ) from error
    trained = finished.model()
    weights = {key: tensor.contiguous() for key, tensor in trained.state_dict().items()}
    if half:
        layers = {key for key, parameter in model.named_parameters() if parameter.dim() > 1}
        weights |= {key: weights[key].half() for key in layers}
    model.load_state_dict(weights)

    content = save(weights)
    description = {
        "model": architecture,
        "sha256": hashlib.sha256(content).hexdigest(),
        "fixed_thresholds": fixed_thresholds(trained),
        "metrics": metrics,
    }
    files = {
        pretrained.WEIGHTS: content,
        pretrained.CONFIG: json.dumps(description, indent=2, allow_nan=False).encode() + b"\n",
        pretrained.CARD: _card(name, model, metrics, config["dataset"], is_best, half).encode(),
    }
    for file, data in files.items():
        with atomic_write(folder / file) as path:
            path.write_bytes(data)
    return folder


def _card(name: str, model: nn.Module, metrics: Any, data: Any, is_best: bool, half: bool) -> str:
    if hasattr(model, "sample"):
        pipeline = "unconditional-image-generation"
        imports = "from torchvision.utils import save_image"
        usage = "images = model.sample(16)\n"
        if labels := getattr(model, "labels", []):
            usage += f"images = model.sample(16, label={labels[-1]})  # one of {labels}\n"
        usage += 'save_image(images, "images.png", normalize=True, value_range=(-1, 1))'
    else:
        shape = [1, data["channels"], data["image_size"], data["image_size"]]
        shape = [data["T"], *shape] if "T" in data else shape
        pipeline = "image-classification" if hasattr(model, "classes") else "image-to-image"
        imports, usage = "import torch", f"output = model(torch.zeros({shape}))"
    fitted, start = metrics.get("prior_fitted"), metrics.get("start_from_sha256")
    protocol = metrics.get("protocol", {})
    table = (
        f"| {title} | {value} | {protocol.get(key, 'test set, after the last epoch')} |"
        for key, (title, value) in format_metrics(metrics).items()
        # the others are of another checkpoint
        if (key.endswith("_best_validation_epoch") if is_best else "_best_" not in key)
    )
    return CARD.format(
        name=name,
        pipeline=pipeline,
        kind=type(model).__name__,
        parameters=metrics["parameters"],
        command=metrics["command"],
        start=f"\nThe weights it started from have the SHA-256 `{start}`." if start else "",
        fitted=f"\nThe flow was fitted again by `{fitted['command']}`." if fitted else "",
        half="\nWeights are rounded to float16; the metrics are of float32." if half else "",
        imports=imports,
        usage=usage,
        metrics="\n".join(table),
    )
