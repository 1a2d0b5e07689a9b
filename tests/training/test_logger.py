"""Where a run is followed: conf/logger."""

import csv
import sqlite3

import pytest

from sj_taid.training.train import train
from tests.training.conftest import TINY_AUTOENCODING


def logged_metric(where, folder):
    """The metric that a tracker saved, next to the config."""
    if where == "csv":
        assert "lr: 0.001" in (folder / "csv" / "hparams.yaml").read_text()
        with (folder / "csv" / "metrics.csv").open() as file:
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


def test_csv_log_continues_and_survives_a_refusal(tiny, tmp_path):
    def fit(epochs):
        choices = [*TINY_AUTOENCODING, "logger=csv", f"trainer.max_epochs={epochs}"]
        train(tiny(*choices, tiny=False), tmp_path)

    fit(2)
    log = tmp_path / "csv" / "metrics.csv"
    before = log.read_text()
    with pytest.raises(ValueError, match="must be at least the 2 epochs"):
        fit(1)
    assert log.read_text() == before
    fit(3)
    rows = [*csv.DictReader(log.open())]
    assert log.read_text().startswith(before)
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
