"""``sj-taid fit_prior``: fit a mixture of Gaussians to a finished run of ESVAE."""

from __future__ import annotations

import logging
import shlex
from typing import Any

from omegaconf import DictConfig, OmegaConf

from ..model import ESVAE
from ..model.rate import GaussianMixturePrior
from .checkpoint import read_checkpoint, save_mixture
from .config import select_overrides
from .evaluate import drop_nulls
from .generation import OF_SAMPLES
from .run import OVERRIDES, Run, build_part

log = logging.getLogger(__name__)

SETTINGS = ("components", "iterations")


def main(cfg: DictConfig) -> None:
    """Fit ESVAE's mixture of Gaussians to a finished run; its checkpoint keeps it.

    The other tensors of the checkpoint stay as they are. The run is then one that was trained with
    the mixture's settings, and its config, overrides and command say so. The metrics of samples
    from the mixture before are taken out of its metrics.
    """
    run, trust = Run.find(cfg.checkpoint), cfg.trust or ()
    with run.lock():
        config = run.config
        model: Any = run.model(trust)
        require_esvae(model, cfg.checkpoint)
        given = {name: cfg[name] for name in SETTINGS if cfg[name] is not None}
        settings = {name: getattr(model.mixture, name) for name in SETTINGS} | given
        model.mixture = GaussianMixturePrior(model.latent_channels, levels=model.T, **settings)
        dataset = OmegaConf.merge(config.dataset, drop_nulls(cfg).get("dataset", {}))
        data = build_part(dataset, trust)
        data.prepare_data()
        data.setup()
        build_part(config.task, trust, model=model, optimizer=None).fit_prior(data)
        overrides = [f"model.{name}={value}" for name, value in given.items()]
        if run.is_finished:  # before the checkpoint: killed in between, none of them are wrong
            run.save_metrics(_without_mixture(run.metrics, model, overrides))
        config.model.update(given)
        saved = run.folder / OVERRIDES
        run.save_config(config, [*OmegaConf.load(saved), *overrides] if saved.is_file() else None)
        save_mixture(model, read_checkpoint(run.checkpoint), run.checkpoint)
    command = f"sj-taid evaluate checkpoint={shlex.quote(str(run.folder))}"
    log.info("%s has the fitted prior; its metrics: %s", run.checkpoint, command)


def require_esvae(model: Any, source: str) -> None:
    if not isinstance(model, ESVAE):
        raise ValueError(
            f"{source} holds a {type(model).__name__}, which has no prior to fit or to choose; a "
            "mixture of Gaussians is for model=esvae"
        )


def _without_mixture(metrics: dict[str, Any], model: ESVAE, overrides: list[str]) -> dict[str, Any]:
    """The metrics of a run without those of the mixture before, and with further overrides."""
    own = model.sample_from == "mixture"
    for name in (*OF_SAMPLES, "validation_fad"):
        for values in (metrics, metrics.get("protocol", {})):
            values.pop(name if own else f"{name}_mixture", None)
    metrics["overrides"] = select_overrides([*metrics["overrides"], *overrides])
    metrics["command"] = shlex.join(["sj-taid", "train", *metrics["overrides"]])
    return metrics
