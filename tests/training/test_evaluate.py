"""Measuring a run again: its metrics are updated, each figure with its protocol."""

import json
import shutil
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sj_taid.metric import FrechetDistance
from sj_taid.training import evaluation, run
from sj_taid.training.commands import evaluate, train
from tests.training.conftest import CONF, TINY_CLASSIFICATION, TINY_VAE, Network, write_images


def composed(folder, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        checkpoint = f"checkpoint={folder}/{run.CHECKPOINTS}/last.ckpt"
        return compose("evaluate", [checkpoint, "trainer.accelerator=cpu", *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """A finished run, to be copied."""
    folder = tmp_path_factory.mktemp("finished")
    train(tiny(*TINY_VAE, tiny=False), folder, command="python experiments/train.py")
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def metrics_of(folder):
    return json.loads((folder / run.METRICS).read_text())


def test_from_the_command_line(folder, tmp_path):
    before = metrics_of(folder)
    checkpoint = folder / run.CHECKPOINTS / "last.ckpt"
    script = CONF.parent / "experiments" / "evaluate.py"
    done = subprocess.run(
        [sys.executable, script, f"checkpoint={checkpoint}", "metric.samples=12"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "metric.inception_weights=FILE" in done.stdout
    assert done.stdout.rstrip().endswith(str(folder / run.METRICS))
    after = metrics_of(folder)
    assert after["fad"] > 0 and after["fad"] != before["fad"]
    assert "12 samples" in after["protocol"]["fad"] and after["protocol"]["reconstruction"]
    (evaluation,) = after["evaluations"]
    assert "metric.samples=12" in evaluation["command"]
    assert str(tmp_path) not in evaluation["command"]
    assert evaluation["versions"] and after["command"] == before["command"]
    assert "before training" not in done.stdout  # that was another number of samples
    assert after["epochs"] == before["epochs"]
    assert not list(tmp_path.glob("outputs")) and not list(tmp_path.glob("*.log"))


def test_a_seed_gives_the_figures_of_training_again(folder):
    before = metrics_of(folder)
    after = evaluate(composed(folder))
    assert after["fad"] == before["fad"]
    assert evaluate(composed(folder)) == after == metrics_of(folder)
    other = evaluate(composed(folder, "seed=1"))
    assert other["fad"] != before["fad"]
    assert [evaluation["seed"] for evaluation in other["evaluations"]] == [1]


def test_fid_and_inception_score_where_there_are_weights(folder, monkeypatch):
    monkeypatch.setattr(evaluation, "Inception", Network)
    after = evaluate(composed(folder, "metric.inception_weights=weights.pth", "metric.samples=20"))
    assert after["fid"] > 0 and 1 <= after["inception_score"] <= 4
    assert after["protocol"]["fid"].startswith(FrechetDistance(Network("weights.pth")).protocol)
    assert after["protocol"]["fid"].endswith("20 samples against 359 test images at 8x8")
    assert after["protocol"]["inception_score"].endswith("20 samples")
    # A later evaluation without weights leaves them.
    again = evaluate(composed(folder))
    assert again["fid"] == after["fid"] and again["protocol"]["fid"] == after["protocol"]["fid"]
    first, second = again["evaluations"]
    assert first["figures"] == ["fid", "inception_score"]
    assert second["figures"] == ["reconstruction", "fad"]


def test_the_weights_of_a_run_can_be_left_out(folder):
    config = OmegaConf.load(folder / run.CONFIG)
    config.metric.inception_weights = "gone.pth"
    OmegaConf.save(config, folder / run.CONFIG)
    assert evaluate(composed(folder, "metric.inception_weights=false"))["fad"] > 0


def test_a_classifier(tiny, tmp_path):
    train(tiny(*TINY_CLASSIFICATION, tiny=False), tmp_path)
    after = evaluate(composed(tmp_path))
    assert 0 <= after["accuracy"] <= 1 and "fad" not in after


def test_data_that_were_moved(tiny, tmp_path):
    def at(place):
        return [f"dataset.{name}={tmp_path / place / name}" for name in ("root", "test_root")]

    for name in ("root/cat", "root/dog", "test_root/cat", "test_root/dog"):
        write_images(tmp_path / "here" / name, 4)
    images = ["dataset=image_folder", "dataset.classes=2", "dataset.num_workers=0", *at("here")]
    before = train(tiny(*images, *TINY_CLASSIFICATION, tiny=False), tmp_path / "run")

    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(FileNotFoundError, match=r"no .*here.*root"):
        evaluate(composed(tmp_path / "run"))
    after = evaluate(composed(tmp_path / "run", *at("there")))
    assert after["accuracy"] == before["accuracy"]


def test_errors_say_what_to_do(folder):
    (folder / run.METRICS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no metrics\.json in .*finish the run"):
        evaluate(composed(folder))
    config = OmegaConf.load(folder / run.CONFIG)
    for part in ("dataset", "task"):
        evil = OmegaConf.merge(config, {part: {"_target_": "os.system"}})
        OmegaConf.save(evil, folder / run.CONFIG)
        (folder / run.METRICS).write_text("{}")
        with pytest.raises(ValueError, match=r"names 'os\.system'.*trusted source"):
            evaluate(composed(folder))
