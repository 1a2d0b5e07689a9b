"""Training runs from the configs to the pictures: what is left, resumed and refused."""

import json

import pytest
import torch
from matplotlib import image as mpimg
from omegaconf import OmegaConf

from sj_taid.data import Digits
from sj_taid.training import cli, run
from sj_taid.training.checkpoint import read_checkpoint
from sj_taid.training.classification import Classification
from sj_taid.training.config import compose
from sj_taid.training.parts import build_parts
from sj_taid.training.train import train
from tests.training.conftest import (
    CONF,
    TINY,
    TINY_CLASSIFICATION,
    UNMEASURED,
    exit_code,
    fit,
    write_images,
)

PICTURES = [
    f"{name}.png" for name in ("samples", "reconstructions", "parameters", "attention", "curves")
]


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.slow
def test_train_command_leaves_everything_and_can_be_sampled(tmp_path, sj_taid, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    arguments = ["train", *TINY, "pictures=true", f"hydra.run.dir={folder}"]
    assert exit_code(tmp_path, *arguments) == 0
    assert not (tmp_path / "stderr").read_text()  # nobody else's notes either
    said = (tmp_path / "stdout").read_text().splitlines()
    assert all(said)  # no progress bar, and no blank line in its place
    assert said[-3:] == [
        "Picture: run/samples.png",
        "Metrics: run/metrics.json",
        "Next:    sj-taid sample checkpoint=run",
    ]

    for name in PICTURES:
        assert mpimg.imread(folder / name).std() > 0, name
    metrics = json.loads((folder / run.METRICS).read_text())
    assert metrics["fad"] > 0 and metrics["reconstruction"] > 0
    assert metrics["epochs"] == 1 and metrics["command"].startswith("sj-taid train")
    assert list((folder / "tensorboard").glob("events*"))

    sj_taid("sample", f"checkpoint={folder}", "n=6", "seed=3")
    assert mpimg.imread(folder / "samples-seed3.png").std() > 0
    assert not list(tmp_path.glob("outputs")) and not list(tmp_path.glob("*.log"))


@pytest.mark.slow
def test_train_for_a_time_and_keep_every_epoch(tmp_path):
    every = "{_target_: lightning.pytorch.callbacks.ModelCheckpoint, save_top_k: -1}"
    length = ["trainer.max_epochs=1000", "+trainer.max_time=00:00:00:01"]
    metrics = fit(tmp_path, *UNMEASURED, *length, f"+callbacks.every={every}")
    assert 0 < metrics["epochs"] < 1000
    assert len([*tmp_path.rglob("*.ckpt")]) >= metrics["epochs"] + 1


def test_train_goes_on_within_the_epoch_that_max_steps_ended(tmp_path):
    job = [*UNMEASURED, "trainer.max_epochs=3"]
    fit(tmp_path, *job, "+trainer.max_steps=3")
    assert fit(tmp_path, *job, "+trainer.max_steps=6")["epochs"] == 3
    assert read_checkpoint(run.Run(tmp_path).checkpoint)["global_step"] == 6


class OneCycle(Classification):
    """A task of one's own, whose schedule asks its trainer for the number of steps."""

    def configure_optimizers(self):
        optimizer = self.optimizer(self.parameter_groups())
        steps = self.trainer.estimated_stepping_batches
        return [optimizer], [torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps)]


def test_train_by_a_task_of_ones_own(tmp_path):
    task = [f"task._target_={__name__}.OneCycle", f"trust=[{__name__}.OneCycle]"]
    fit(tmp_path, *TINY_CLASSIFICATION, *task)
    (schedule,) = read_checkpoint(run.Run(tmp_path).checkpoint)["lr_schedulers"]
    assert schedule["total_steps"] == 2


class LastStep(torch.nn.Module):
    """A decoder of one's own."""

    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, x_seq):
        return x_seq[-1]


def test_train_with_a_decoder_of_ones_own(tmp_path):
    name = f"{__name__}.LastStep"
    decoder = [f"decoder._target_={name}", "~decoder.squeeze"]
    fit(tmp_path, *TINY, *decoder, f"trust=[{name}]", "pictures=true")
    assert (tmp_path / "samples.png").is_file() and not (tmp_path / "attention.png").exists()


#: a neuron, ALIF in two ways among them, for each image decoder
CHOICES = [
    *(f"neuron={name}" for name in options("neuron") if not name.startswith("alif")),
    "surrogate=atan neuron.min_v_threshold=0.05",
    "neuron.learn_tau=false trainer.precision=bf16-mixed",
]


@pytest.mark.slow
@pytest.mark.parametrize(("decoder", "choice"), [*zip(options("decoder"), CHOICES, strict=True)])
def test_train_every_choice(tmp_path, decoder, choice):
    chosen = [*choice.split(), "pictures=true", "trainer.limit_train_batches=1"]
    assert fit(tmp_path, *TINY, f"decoder={decoder}", *chosen)["fad"] > 0
    assert {*PICTURES} <= {path.name for path in tmp_path.iterdir()}


def test_compose_starts_fsvae_at_the_originals_neuron():
    cfg = compose("train").neuron
    assert (cfg.init_tau, cfg.v_threshold, cfg.v_reset) == (pytest.approx(4 / 3), 0.2, 0.0)
    assert not cfg.decay_input and not cfg.detach_reset
    assert cfg.surrogate_function._target_.endswith("Rect")


def test_train_fetches_data_before_reading(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(Digits, "prepare_data", lambda self: order.append("prepared"))
    load = Digits.load
    monkeypatch.setattr(Digits, "load", lambda self: order.append("loaded") or load(self))
    fit(tmp_path, *UNMEASURED)
    assert order[:2] == ["prepared", "loaded"] and order.count("loaded") == 1


@pytest.mark.slow
def test_train_repeats_with_the_same_seed(trained, tmp_path):
    first = run.Run(trained(*UNMEASURED)).metrics  # of seed 0
    again, other = (fit(tmp_path / str(seed), *UNMEASURED, f"seed={seed}") for seed in (0, 1))
    assert first["reconstruction"] == again["reconstruction"] != other["reconstruction"]


@pytest.mark.slow
def test_train_measures_the_same_after_a_kill_before_the_metrics(trained):
    # Trained so far that the images depend on the latent.
    longer = ["trainer.max_epochs=3", "trainer.limit_train_batches=null", "dataset.limit=300"]
    there = run.Run(trained(*UNMEASURED, *longer))
    before = there.metrics
    (there.folder / run.METRICS).unlink()
    after = fit(there.folder, *UNMEASURED, *longer)
    differ = [k for k, v in before.items() if isinstance(v, float) and after[k] != v]
    assert differ in ([], ["training_seconds"])


def test_damaged_checkpoint_is_refused_before_anything_is_written(trained):
    there = run.Run(trained(*UNMEASURED))
    there.checkpoint.write_bytes(b"PK half a checkpoint")
    metrics = there.metrics
    with pytest.raises(ValueError, match=r"last\.ckpt is not a whole checkpoint"):
        fit(there.folder, *UNMEASURED, "trainer.max_epochs=2")
    assert there.metrics == metrics and there.config.trainer.max_epochs == 1


CLASSIFIER = "task=classification model=classifier_small"


def test_classes_are_counted_for_all_that_learn_from_labels(tmp_path):
    def built(*overrides):
        return build_parts(compose("train", overrides)).values

    for name in ("cat", "dog"):
        write_images(tmp_path / name, 1)
    images = ["dataset=image_folder", f"dataset.root={tmp_path}"]
    values = built(*images, "feature_loss=classifier")
    assert values["feature_loss"]["classes"] == 2 and values["dataset"]["num_workers"] > 0
    # Data that do not say how many they have leave it to the model.
    values = built(*CLASSIFIER.split(), "dataset.classes=null", "model.classes=7")
    assert (values["dataset"]["classes"], values["model"]["classes"]) == (None, 7)
    flat = [*CLASSIFIER.split(), images[0], f"dataset.root={tmp_path / 'cat'}"]
    with pytest.raises(ValueError, match="a classifier needs classes, but the data have none; put"):
        built(*flat)


@pytest.mark.slow
@pytest.mark.parametrize(
    "choices",
    [
        "model=fsvae_small neuron=lif decoder=fixed feature_loss=classifier optimizer=adam",
        "task=classification loss=cross_entropy optimizer=sgd surrogate=rectangle logger=csv",
        "task=classification dataset=image_folder dataset.root=images neuron=alif_channel",
    ],
)
def test_train_refuses_nonsense_wherever_it_is(tmp_path, monkeypatch, choices):
    """In every key, so also in those to come: none is named here."""

    def start(*_):
        pytest.fail(f"{key}={nonsense} is taken")

    monkeypatch.setattr("sj_taid.training.train.prepare_start", start)
    monkeypatch.chdir(tmp_path)
    for image in ("cat", "dog"):
        write_images(tmp_path / "images" / image, 10)
    composed = compose("train", choices.split())
    leaves = run.flatten(OmegaConf.to_container(composed))
    groups = {path.name for path in CONF.iterdir()}  # which Hydra keeps from values
    nonsense = {"x": [{"y": None}]}
    keys = {key for key in leaves if not key.endswith(("_target_", "_partial_"))}
    for key in keys - groups - {"trust", "compile"}:
        cfg = composed.copy()
        OmegaConf.set_struct(cfg, False)
        OmegaConf.update(cfg, key, nonsense, merge=False)
        with pytest.raises(cli.USER_ERRORS) as refused:
            train(cfg, tmp_path / "run")
        name = key.rpartition(".")[2]
        assert name in str(refused.value) or "${" in str(leaves[key]), (key, refused.value)
        assert not (tmp_path / "run").exists()
