"""Measuring a run again: a file for each checkpoint, a protocol for each metric."""

import pytest
import torch
from omegaconf import OmegaConf

from sj_taid._internal.context import seeded
from sj_taid.monitoring import monitor
from sj_taid.training import run
from sj_taid.training.parts import build_parts
from tests.training.conftest import TINY, TINY_CLASSIFICATION, evaluated, fit, write_images


@pytest.fixture(scope="module")
def finished(trained):
    """Trained so far that the images depend on the latent."""
    longer = ["dataset.batch_size=64", "trainer.limit_train_batches=22", "optimizer.lr=1e-2"]
    return trained(*TINY, *longer)


def test_evaluate_command(folder, tmp_path, sj_taid, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    before = run.Run(folder).metrics
    checkpoint = folder / run.CHECKPOINTS / "last.ckpt"
    sj_taid("evaluate", f"checkpoint={checkpoint}", "metric.samples=112")
    said = capfd.readouterr()
    assert not said.err
    assert said.out.rstrip().endswith(str(folder / "evaluations" / "last.json"))
    (evaluation,) = run.Run(folder).evaluations
    figures, protocol = evaluation["metrics"], evaluation["protocol"]
    assert figures["fad"] > 0 and figures["fad"] != before["fad"]
    assert {"fad", "fad_recall", "reconstruction"} < protocol.keys()
    assert figures.keys() - protocol.keys() == {"sample_variance", "firing_rate"}
    assert "112 samples" in protocol["fad"]
    assert evaluation["overrides"] == ["metric.samples=112"]
    assert evaluation["command"] == "sj-taid evaluate metric.samples=112"
    assert evaluation["versions"] and run.Run(folder).metrics == before
    assert f"FAD, own autoencoder ↓: {figures['fad']:.2f}\n" in said.out
    assert not list(tmp_path.glob("outputs")) and not list(tmp_path.glob("*.log"))


def test_evaluate_repeats_the_metrics_of_training(folder):
    first = evaluated(folder)
    assert first["metrics"]["fad"] == run.Run(folder).metrics["fad"]
    assert first["protocol"] == run.Run(folder).metrics["protocol"]
    again = evaluated(folder, "trainer.accelerator=cpu")
    assert again == first
    other = evaluated(folder, "seed=1")
    assert other["metrics"]["fad"] != first["metrics"]["fad"] and other["seed"] == 1
    assert run.Run(folder).evaluations == [other]  # in place of those before


def test_firing_rate_is_that_of_a_pass(folder):
    model, data = run.load_model(folder), build_parts(run.Run(folder).config).load_data()
    images, _ = next(iter(data.test_dataloader()))
    with monitor(model) as watch, seeded(0), torch.no_grad():
        model(images[:8])
    assert run.Run(folder).metrics["firing_rate"] == pytest.approx(watch.firing_rate(), rel=1e-4)


def test_evaluate_without_the_weights_of_the_run(folder):
    config = OmegaConf.load(folder / run.CONFIG)
    config.metric.inception_weights = "gone.pth"
    OmegaConf.save(config, folder / run.CONFIG)
    assert evaluated(folder, "metric.inception_weights=false")["metrics"]["fad"] > 0


def test_evaluate_classifier(trained):
    folder = trained(*TINY_CLASSIFICATION)
    before, after = run.Run(folder).metrics, evaluated(folder)
    assert after["metrics"]["accuracy"] == before["accuracy"] and "fad" not in after["metrics"]
    assert after["protocol"]["accuracy"].endswith("stopped by trainer.limit_test_batches=1")
    with pytest.raises(ValueError, match=r"metric\.samples is given, but the run has no metric"):
        evaluated(folder, "metric.samples=100")
    assert len(run.Run(folder).evaluations) == 1


def test_evaluate_moved_data(tmp_path):
    def at(place):
        return [f"dataset.{name}={tmp_path / place / name}" for name in ("root", "test_root")]

    for name in ("root/cat", "root/dog", "test_root/cat", "test_root/dog"):
        write_images(tmp_path / "here" / name, 4)
    images = ["dataset=image_folder", "dataset.num_workers=0", *at("here")]
    before = fit(tmp_path / "run", *images, *TINY_CLASSIFICATION)
    assert run.load_model(tmp_path / "run").classes == 2  # as many as folders

    (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(FileNotFoundError, match=r"no .*here.*root"):
        evaluated(tmp_path / "run")
    after = evaluated(tmp_path / "run", *at("there"))
    assert after["metrics"]["accuracy"] == before["accuracy"]


def test_evaluate_trusts_nothing_that_the_run_says_of_itself(folder):
    config = OmegaConf.load(folder / run.CONFIG)
    evil = {"metric": {"_target_": "os.system"}, "trust": ["os.system"]}
    OmegaConf.save(OmegaConf.merge(config, evil), folder / run.CONFIG)
    with pytest.raises(ValueError, match=r"names 'os\.system'.*you trust it"):
        evaluated(folder)
