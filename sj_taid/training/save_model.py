"""Models of finished runs, written for :func:`.create_model`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from .._internal.checks import expand_home
from .._internal.extras import TRAIN, needs
from ..calibration import fixed_thresholds
from ..pretrained import CONFIG, WEIGHTS, build
from .files import atomic_write
from .run import Run

with needs(TRAIN):
    from safetensors.torch import save


def save_model(run: str | Path, folder: str | Path, half: bool = False) -> None:
    """Write the model of a finished run into ``folder``, for :func:`.create_model`.

    Args:
        run: the run's folder, whose last checkpoint is taken, or its ``checkpoints/best.ckpt``.
        folder: a new one, or the folder of an earlier call, whose model is replaced.
        half: store the weights of convolutions and linear layers as float16. Biases, norms, neurons
            and buffers keep their dtype. A spike changes where a voltage is near its threshold.

    Raises:
        FileNotFoundError: the run is not finished, or has no checkpoint.
        FileExistsError: ``folder`` holds something else than an earlier model.
        ValueError: a model of custom classes, which :func:`.create_model` would not build, or a
            checkpoint that was not tested.
    """
    folder = expand_home(folder)
    config = folder / CONFIG  # another program's has the same name
    before = config.read_text("utf-8", "replace") if config.is_file() else ""
    is_ours = '"sha256"' in before and '"sj-taid"' in before
    if folder.is_dir() and any(folder.iterdir()) and not is_ours:
        raise FileExistsError(f"{folder} holds files that are no earlier model; choose another")
    finished = Run.find(run)
    if finished.checkpoint not in (finished.best, Run(finished.folder).checkpoint):
        raise ValueError(f"{finished.checkpoint} was not tested; save the run, or its best.ckpt")
    metrics, architecture = finished.latest_metrics, finished.model_config
    model, trained = build(architecture), finished.model()
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
    with atomic_write(folder / WEIGHTS) as path:
        path.write_bytes(content)
    with atomic_write(config) as path:
        path.write_text(json.dumps(description, indent=2, allow_nan=False) + "\n", "utf-8")
