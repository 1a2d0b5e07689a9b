"""Where a run is followed: conf/logger."""

import csv
import sqlite3

import pytest

from sj_taid.training.train import train
from tests.training.conftest import TINY_AUTOENCODING


def logged_metric(where, folder):
    """The metric that a tracker saved, next to the config."""
    if where == "csv":
        assert "lr: 0.001" in (folder / "csv" / "version_0" / "hparams.yaml").read_text()
        with (folder / "csv" / "version_0" / "metrics.csv").open() as file:
            return [
                float(row["reconstruction"])
                for row in csv.DictReader(file)
                if row["reconstruction"]
            ]
    with sqlite3.connect("mlflow.db") as store:
        assert ("0.001",) in store.execute(
            "SELECT value FROM params WHERE key='optimizer/lr'"
        ).fetchall()
        return [v for (v,) in store.execute("SELECT value FROM metrics WHERE key='reconstruction'")]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["csv", "mlflow"])
def test_logger_has_config_and_metrics(tiny, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    metrics = train(tiny(*TINY_AUTOENCODING, f"logger={name}", tiny=False), tmp_path)
    saved = logged_metric(name, tmp_path)
    assert saved == [pytest.approx(metrics["reconstruction"])]
    assert not (tmp_path / "tensorboard").exists()


def test_resumed_run_leaves_its_csv_log_alone(tiny, tmp_path):
    def fit(epochs):
        choices = [*TINY_AUTOENCODING, "logger=csv", f"trainer.max_epochs={epochs}"]
        train(tiny(*choices, tiny=False), tmp_path)

    fit(2)
    before = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    with pytest.raises(ValueError, match="must be at least the 2 epochs"):
        fit(1)
    fit(3)
    first, second = sorted(tmp_path.glob("csv/*/metrics.csv"))
    assert first.read_text() == before
    rows = [row for path in (first, second) for row in csv.DictReader(path.open())]
    assert [row["epoch"] for row in rows if row["train/reconstruction"]] == ["0", "1", "2"]


@pytest.mark.slow
def test_wandb_has_a_run(tiny, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tiny(*TINY_AUTOENCODING, "logger=wandb", tiny=False), tmp_path)
    wandb.finish()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_train_without_logger(tiny, tmp_path):
    train(tiny(*TINY_AUTOENCODING, "~logger", tiny=False), tmp_path)
    assert not {"tensorboard", "csv", "lightning_logs"} & {path.name for path in tmp_path.iterdir()}
