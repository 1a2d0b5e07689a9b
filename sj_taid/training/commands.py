"""What the commands do with a composed config: train, evaluate, sample. ``cli`` composes it."""

from __future__ import annotations

import copy
import logging
import shlex
import sys
import warnings
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import (
    ModelCheckpoint,
    ProgressBar,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf

from ..calibration import calibrate
from ..model import ESVAE
from ..model.rate import GaussianMixturePrior
from .allocator import reuse_freed_memory
from .callbacks import (
    AtomicCheckpointIO,
    BestCheckpoint,
    FollowTest,
    LastEpoch,
    Pictures,
    RandomNumbers,
)
from .evaluation import Evaluator, bare_trainer, seeded
from .files import written_by_others
from .generation import OF_SAMPLES
from .plot import draw_grid
from .provenance import provenance
from .run import (
    OVERRIDES,
    Run,
    build,
    chosen,
    given_overrides,
    is_below,
    is_first_process,
    read_checkpoint,
)
from .task import of_best_epoch

log = logging.getLogger(__name__)

#: what a resumed run keeps
KEPT = (
    "dataset._target_",
    "dataset.name",
    # Who chooses the images to train on: others would bring some of them into the validation set.
    "dataset.limit",
    "dataset.validation",
    "dataset.seed",
    "task._target_",
    # The checkpoint brings the state of these, in which the old values would go on unseen.
    "optimizer",
    "task.scheduler",
    "task.lr_scale",
    "task.prior_lr_scale",
)
#: what ends a run from outside; Lightning leaves with a success where a cluster ends it
ENDED: dict[type[BaseException], str] = {
    KeyboardInterrupt: "Interrupted",
    SIGTERMException: "Terminated",
}


def train(
    cfg: DictConfig, folder: Path, *, repeated: Sequence[str] | None = None, **origin: Any
) -> dict[str, Any]:
    """Train, test, measure and draw what the task asks for; all is left in ``folder``.

    A half-done run in ``folder`` goes on from its last epoch. In a distributed run every process
    trains, and the first alone measures, writes and returns the metrics.

    Args:
        cfg: the run's config.
        folder: the run's folder.
        repeated: the overrides of the command line, which ``resume=`` will repeat.
        origin: what ``metrics.json`` says of the run beside its figures, as the command.

    Raises:
        FloatingPointError: the model has diverged. The checkpoint of the epoch before is kept.
        OSError: a file cannot be written. What stood there before is whole.
    """
    _leave_out_notes()
    origin |= provenance()
    options = _compile_options(cfg.compile)
    _check_whole(cfg, 0, "trainer.max_epochs", "seed")
    _check_for_classifier(cfg)
    count_classes(cfg)
    trust = cfg.trust or ()
    reuse_freed_memory()
    if (wandb := sys.modules.get("wandb")) and wandb.run:
        wandb.finish()  # an earlier job of a sweep, which Lightning would go on with
    run = Run(folder)
    source = run
    if cfg.resume and not run.checkpoint.is_file():
        source = Run.find(cfg.resume)
    resume = source.checkpoint if source.checkpoint.is_file() else None
    if resume:
        read_checkpoint(resume)  # a damaged one is an error before hours of work, with a remedy
        for key, values in source.differences(cfg).items():
            if is_below(key, KEPT):
                with_epochs = ", which follows trainer.max_epochs" if key.endswith("T_max") else ""
                raise ValueError(
                    f"{source.folder} was trained with another {key} ({values}){with_epochs}; "
                    "resume= goes on with the same data, task, optimizer and schedule: leave that "
                    "out, or start a run without resume="
                )
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = build(cfg.dataset, trust)
    if not isinstance(data, get_object(cfg.task._target_).takes):
        raise ValueError(
            f"dataset={data.name} holds recordings, which only a classifier takes; "
            "add task=classification, or choose a data set of images"
        )
    # In this layout convolutions are faster, in bfloat16 above all.
    model = build(cfg.model, trust).to(memory_format=torch.channels_last)
    if resume:
        source.load_weights(copy.deepcopy(model))  # those of another are an error now
    optimizer = instantiate(cfg.optimizer)
    task = build(cfg.task, trust, model=model, optimizer=optimizer)
    evaluator = _evaluator(cfg, trust)
    others = [instantiate(callback) for callback in (cfg.get("callbacks") or {}).values()]
    if any(isinstance(callback, StochasticWeightAveraging) for callback in others):
        raise ValueError(
            "Lightning's StochasticWeightAveraging averages after the last checkpoint is written, "
            "which would keep other weights than are measured; take WeightAveraging or "
            "EMAWeightAveraging of lightning.pytorch.callbacks"
        )
    data.prepare_data()
    data.setup()
    rate = cfg.neuron_start.get("calibrate")
    if rate:  # resumed too, where the checkpoint's thresholds follow: before_training measures it
        images, _ = next(iter(data.train_dataloader()))
        report = calibrate(model, task.model_input(images), rate=rate)
        if not resume:
            log.info("%s", report)
    before = task.before_training(data, evaluator)
    first = is_first_process()
    if first:  # not before all is well: what is refused leaves the run that is there as it was
        run.begin(cfg, repeated)
    if options is not None:
        torch.compiler.reset()  # the graphs of a sweep's earlier jobs would count against a limit
        model.compile(**options)  # in place, so that the keys of its checkpoints stay as they are

    # One file, replaced whole after every epoch.
    checkpoints = ModelCheckpoint(
        run.checkpoint.parent,
        filename=run.checkpoint.stem,
        enable_version_counter=False,
        save_on_train_epoch_end=True,
    )
    pictures = Pictures(folder, cfg.pictures)
    best = BestCheckpoint(run.best, f"val/{task.chosen_by}")
    if task.chosen_by and data.validation_set is not None:
        keepers = [LastEpoch(), best, checkpoints]  # in this order: the last one knows of the best
    else:
        keepers = [LastEpoch(), checkpoints]
    timer = Timer()  # kept in the checkpoint: the seconds before a kill count
    if not cfg.trainer.enable_progress_bar:  # Lightning refuses a bar then
        others = [callback for callback in others if not isinstance(callback, ProgressBar)]
    trainer = instantiate(
        cfg.trainer,
        default_root_dir=folder,
        logger=instantiate(cfg.logger)(save_dir=folder) if cfg.get("logger") else False,
        callbacks=[*keepers, timer, RandomNumbers(), pictures, *others],
    )
    for tracker in trainer.loggers:
        tracker.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    trainer.strategy.checkpoint_io = AtomicCheckpointIO()
    trainer.fit(task, data, ckpt_path=resume, weights_only=True)
    # What is measured is what is kept. Lightning's averaged weights would not be in the task where
    # a resumed run has no epoch left to train.
    kept = run.checkpoint if run.checkpoint.is_file() else resume
    if kept:
        task.load_state_dict(read_checkpoint(kept)["state_dict"])
    else:  # no epoch was asked for, and what is untrained is measured
        task.on_last_epoch_end(data, task)

    figures = task.figures(trainer, data, evaluator)
    if not first:
        return {}
    figures |= task.validated(data, pictures.epochs)
    if best.epoch:
        task.load_state_dict(read_checkpoint(run.best)["state_dict"])
        figures |= of_best_epoch(task.tested(_tester(cfg), data))
        figures["best_validation_epoch"] = best.epoch
    for tracker in trainer.loggers:
        found = {name: value for name, value in figures.items() if isinstance(value, float)}
        tracker.log_metrics(found, step=trainer.global_step)
        tracker.finalize("success")

    metrics = {
        **figures,
        **before,
        "epochs": trainer.current_epoch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_seconds": round(timer.time_elapsed(), 1),
        "seed": cfg.seed,
        **origin,
    }
    run.save_metrics(metrics)
    for line in task.report(metrics):
        log.info(line)
    return metrics


def _check_whole(cfg: DictConfig, least: int, *keys: str) -> None:
    for key in keys:
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{key} must be a whole number from {least}, but it is {value!r}")


def _check_for_classifier(cfg: DictConfig) -> None:
    """An error for what only a classifier takes, where the task is another."""
    for key, choices in {"loss": "loss=", "model.per_channel": "neuron=alif_channel"}.items():
        if OmegaConf.select(cfg, key) and "loss" not in cfg.task:
            raise ValueError(
                f"{key}, which {choices} sets, is for a classifier; add task=classification, or "
                "leave that choice out"
            )


def _tester(cfg: DictConfig, **options: Any) -> L.Trainer:
    """Tests later what the run tests at its end."""
    alike = {key: cfg.trainer[key] for key in ("accelerator", "precision", "limit_test_batches")}
    return bare_trainer(**alike, **options)


def _leave_out_notes() -> None:
    """Others' notes on what is meant so, or what nobody who trains can change."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # devices and services
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # Triton is not there
    for note in (
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of torch
        r".*smaller than the logging interval",  # nothing is logged by the step
        r".*does not have many workers",  # images in memory are faster without
    ):
        warnings.filterwarnings("ignore", note)


def _evaluator(cfg: DictConfig, trust: Collection[str]) -> Evaluator | None:
    """What compares the model's samples with the data; None where the task draws none."""
    if not cfg.get("metric"):
        return None
    # An older run's config names no class.
    metric = OmegaConf.merge({"_target_": "sj_taid.training.evaluation.Evaluator"}, cfg.metric)
    accelerator = cfg.trainer.accelerator
    return build(metric, trust, cache_dir=cfg.cache_dir, seed=cfg.seed, accelerator=accelerator)


def count_classes(cfg: DictConfig) -> None:
    """Let the data say how many classes there are, where a classifier was not told."""
    if cfg.model.get("classes", 0) is None:
        cfg.dataset.classes = build(cfg.dataset, cfg.trust or ()).classes


def _compile_options(given: bool | DictConfig) -> dict[str, Any] | None:
    """Those of torch.compile; None where nothing is to be compiled."""
    if not isinstance(given, bool | DictConfig):
        raise ValueError(
            "compile must be true, false or options of torch.compile, such as "
            f"'compile={{mode: max-autotune}}', but it is {given!r}"
        )
    if not given:
        return None
    # Batches have one size but for the last of a test, so each size may have a graph of its own.
    return {"dynamic": False, **({} if given is True else given)}


def train_once(cfg: DictConfig) -> float | None:
    """Train the job that Hydra composed, unless its folder holds the finished run already."""
    hydra_cfg = HydraConfig.get()
    run = Run(hydra_cfg.runtime.output_dir)
    choices = {k: v for k, v in hydra_cfg.runtime.choices.items() if not k.startswith("hydra/")}
    count_classes(cfg)
    with run.lock():
        metrics = run.finished(cfg, _places(hydra_cfg))
        if metrics is None:
            choices["dataset"] = cfg.dataset.name  # which names a folder of images too
            said = {"choices": choices, **origin("train", hydra_cfg)}
            try:
                with written_by_others(run.folder):
                    metrics = train(cfg, run.folder, repeated=_repeated(hydra_cfg), **said)
            except (KeyboardInterrupt, SystemExit) as error:  # Lightning makes this of Ctrl-C
                for kind, ended in ENDED.items():
                    if kind in (type(error), type(error.__context__)):
                        raise SystemExit(f"{ended}. {_how_to_go_on(run)}") from error
                raise
            except (OSError, RuntimeError) as error:  # of a disk, a file, a process
                error.add_note(f"Once that is mended: {_how_to_go_on(run)}")
                raise
        else:
            log.info("This run is finished already and is not run again.")
    kinds = ["Metrics", *["checkpoint"] * run.checkpoint.is_file(), *["pictures"] * cfg.pictures]
    if is_first_process():
        log.info("%s: %s", ", ".join(kinds), run.folder)
    return metrics.get(cfg.objective)


def _how_to_go_on(run: Run) -> str:
    if not run.checkpoint.is_file() or run.is_finished:  # by a command before this one
        return "Give the same command again, since no epoch of it was whole."
    return f"Go on with: sj-taid train resume={shlex.quote(str(run.folder))}"


def _repeated(hydra_cfg: Any) -> list[str]:
    """What ``resume=`` is to repeat of the command line."""
    custom = [
        f"{source.schema}://{source.path}"
        for source in hydra_cfg.runtime.config_sources
        if source.provider.endswith("command-line")
    ]
    searched = [f"hydra.searchpath=[{','.join(custom)}]"] if custom else []
    return [*hydra_cfg.overrides.task, *searched]


def _places(hydra_cfg: Any) -> list[str]:
    """The keys, and whole overrides, that are no choices: where things lie, and how it looks."""
    return list(hydra_cfg.job.config.override_dirname.exclude_keys)


def origin(command: str, hydra_cfg: Any) -> dict[str, Any]:
    """The command line and its overrides, for another machine: without where things lie here."""
    overrides = chosen(hydra_cfg.overrides.task, _places(hydra_cfg))
    return {"overrides": overrides, "command": shlex.join(["sj-taid", command, *overrides])}


def evaluate(cfg: DictConfig, **origin: Any) -> dict[str, Any]:
    """Measure ``cfg.checkpoint``; what is given back is left in a file among its run's evaluations.

    Args:
        cfg: what to measure, and what to do otherwise than its run did.
        origin: what the evaluation says of itself beside its figures, as the command.
    """
    _leave_out_notes()
    reuse_freed_memory()
    run, trust = _asked_run(cfg), cfg.trust or ()
    with run.lock():
        differing = _given(OmegaConf.to_container(cfg, resolve=True))
        cfg = cast(DictConfig, OmegaConf.merge(run.config, differing))
        model = run.model(trust)
        data = build(cfg.dataset, trust)
        data.prepare_data()
        data.setup()
        task = build(cfg.task, trust, model=model, optimizer=None)
        with seeded(cfg.seed):
            tester = _tester(cfg, callbacks=[FollowTest()])
            figures = task.figures(tester, data, _evaluator(cfg, trust))
        report = task.report(figures)
        protocol = figures.pop("protocol", {})
        protocol = {name: protocol[name] for name in figures if name in protocol}
        if run.checkpoint == run.best:
            protocol = of_best_epoch(protocol)
            figures = of_best_epoch(figures)
        evaluation = {
            "protocol": protocol,
            "figures": figures,
            "checkpoint_sha256": run.checkpoint_sha256(),
            "seed": cfg.seed,
            **origin,
            **provenance(),
        }
        path = run.save_evaluation(evaluation)
    for line in report:
        log.info(line)
    if cfg.get("metric") and cfg.metric.inception_weights is None:
        log.info(
            "FID and the Inception score are left out for want of weights: add "
            "metric.inception_weights=FILE, or =download where there is internet."
        )
    log.info("All figures are in %s", path)
    return evaluation


def _asked_run(cfg: DictConfig) -> Run:
    if OmegaConf.is_missing(cfg, "checkpoint"):
        raise SystemExit("give checkpoint=RUN, the folder of a run or a checkpoint in it")
    return Run.find(cfg.checkpoint)


def _given(config: Any) -> dict[str, Any]:
    """The settings that are not null."""
    given = {}
    for key, value in config.items():
        value = _given(value) if isinstance(value, dict) else value
        if value not in (None, {}):
            given[key] = value
    return given


def sample(cfg: DictConfig) -> None:
    """Draw ``cfg.n`` samples of the model in ``cfg.checkpoint`` into a picture."""
    _check_whole(cfg, 1, "n", "columns")
    if cfg.output and Path(cfg.output).is_dir():
        raise ValueError(f"output must name a picture, but {cfg.output} is a folder: add a name")
    run = _asked_run(cfg)
    model: Any = run.model(cfg.trust or ())
    if not hasattr(model, "sample"):
        raise ValueError(
            f"{cfg.checkpoint} holds a {type(model).__name__}, which draws nothing; "
            "give a checkpoint of task=generation"
        )
    if cfg.sample_from:
        _require_esvae(model, cfg.checkpoint)
    torch.manual_seed(cfg.seed)
    with model.draw_from(cfg.sample_from) if cfg.sample_from else nullcontext():
        images = model.sample(cfg.n)
    prior = f"{cfg.sample_from}-" if cfg.sample_from else ""
    path = Path(cfg.output or run.folder / f"samples-{prior}seed{cfg.seed}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(images, path, cfg.columns, "Samples from the prior")
    log.info("%d samples are in %s", cfg.n, path)


def fit_prior(cfg: DictConfig) -> None:
    """Fit ESVAE's mixture of Gaussians to a finished run; its checkpoint keeps it.

    The other tensors of the checkpoint stay as they are. The run is then one that was trained with
    the mixture's settings, and its config, overrides and command say so. The figures of samples
    from the mixture before are taken out of its metrics.
    """
    run = _asked_run(cfg)
    with run.lock():
        config = run.config
        model: Any = run.model(cfg.trust or ())
        _require_esvae(model, cfg.checkpoint)
        names = ("components", "iterations")
        given = {name: cfg[name] for name in names if cfg[name] is not None}
        settings = {name: getattr(model.mixture, name) for name in names} | given
        mixture = GaussianMixturePrior(model.latent_channels, levels=model.T, **settings)
        model.mixture = mixture
        data = build(OmegaConf.merge(config.dataset, _given(cfg.dataset)), cfg.trust or ())
        data.prepare_data()
        data.setup()
        build(config.task, cfg.trust or (), model=model, optimizer=None).fit_prior(data)
        metrics = run.metrics if run.is_finished else {}
        checkpoint = read_checkpoint(run.checkpoint)
        # Beside averaged weights Lightning keeps those that go on training.
        for state in {"state_dict", "current_model_state"} & checkpoint.keys():
            for name, tensor in mixture.state_dict().items():
                checkpoint[state][f"model.mixture.{name}"] = tensor
        own = model.sample_from == "mixture"
        for name in OF_SAMPLES:
            for figures in (metrics, metrics.get("protocol", {})):
                figures.pop(name if own else f"{name}_mixture", None)
        later = [f"model.{name}={value}" for name, value in given.items()]
        if metrics:  # before the checkpoint: what is killed between has fewer figures, none wrong
            metrics["overrides"] = chosen([*given_overrides(metrics), *later], ())
            metrics["command"] = shlex.join(["sj-taid", "train", *metrics["overrides"]])
            run.save_metrics(metrics)
        config.model.update(given)
        notes = run.folder / OVERRIDES
        run.save_config(config, [*OmegaConf.load(notes), *later] if notes.is_file() else None)
        AtomicCheckpointIO().save_checkpoint(checkpoint, run.checkpoint)
    figures = f"sj-taid evaluate checkpoint={shlex.quote(str(run.folder))}"
    log.info("%s has the fitted prior; its figures: %s", run.checkpoint, figures)


def _require_esvae(model: Any, place: str) -> None:
    if not isinstance(model, ESVAE):
        raise ValueError(
            f"{place} holds a {type(model).__name__}, which has no prior to fit or to choose; a "
            "mixture of Gaussians is for model=esvae"
        )
