"""Where a run is followed: conf/logger."""

import csv
import sqlite3

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.training.conftest import TINY_CLASSIFICATION, UNMEASURED, fit


@pytest.mark.slow
def test_mlflow_has_config_and_metrics(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    metrics = fit(tmp_path, *UNMEASURED, "logger=mlflow")
    with sqlite3.connect("mlflow.db") as store:
        rates = store.execute("SELECT value FROM params WHERE key='optimizer/lr'").fetchall()
        saved = store.execute("SELECT value FROM metrics WHERE key='reconstruction'").fetchall()
    assert ("0.001",) in rates and saved == [(pytest.approx(metrics["reconstruction"]),)]
    assert not (tmp_path / "tensorboard").exists()


def test_resumed_run_has_config_and_metrics_in_a_csv_log_of_its_own(tmp_path):
    job = [*UNMEASURED, "logger=csv"]
    fit(tmp_path, *job, "trainer.max_epochs=2")
    before = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert fit(tmp_path, *job)["epochs"] == 2  # it is finished
    metrics = fit(tmp_path, *job, "trainer.max_epochs=3")
    first, second = sorted(tmp_path.glob("csv/*/metrics.csv"))
    assert first.read_text() == before
    rows = [row for path in (first, second) for row in csv.DictReader(path.open())]
    saved = [float(row["reconstruction"]) for row in rows if row["reconstruction"]]
    assert saved[-1] == pytest.approx(metrics["reconstruction"])
    assert "lr: 0.001" in second.with_name("hparams.yaml").read_text()
    assert not (tmp_path / "tensorboard").exists()
    assert [row["epoch"] for row in rows if row["train/reconstruction"]] == ["0", "1", "2"]


def test_tensorboard_has_each_layers_state_and_pictures(trained):
    folder = trained(*TINY_CLASSIFICATION, "pictures=true")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    tags = events.Tags()
    layers = {tag.partition("/")[2] for tag in tags["scalars"] if tag.startswith("tau/")}
    assert len(layers) == 4
    for name in ("firing_rate", "v_threshold"):
        assert {f"{name}/{layer}" for layer in layers} <= {*tags["scalars"]}
    assert events.Scalars("lr-Adam/weights")[0].value == pytest.approx(1e-3)
    assert {"confusion", "curves", "parameters"} <= {*tags["images"]}


@pytest.mark.slow
def test_wandb_has_a_run_for_each_job_of_a_sweep(sj_taid, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sweep = ["-m", "logger=wandb", "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    sj_taid("train", *sweep, *UNMEASURED)
    assert len(list(tmp_path.glob("*/wandb/offline-run-*/*.wandb"))) == 2
    assert wandb.run is None
