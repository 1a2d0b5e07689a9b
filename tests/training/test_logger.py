"""Where a run is followed: conf/logger."""

import pandas as pd
import pytest

from sj_taid.training.train import train
from tests.training.conftest import TINY_AUTOENCODING

#: what each tracker leaves in a run's folder, which is the current one here
LEFT = {"csv": "csv/metrics.csv", "mlflow": "mlflow.db", "wandb": "wandb/offline-run-*/*.wandb"}


@pytest.mark.slow
@pytest.mark.parametrize("name", LEFT)
def test_logger_config_trains(tiny, tmp_path, monkeypatch, name):
    pytest.importorskip({"csv": "lightning"}.get(name, name))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    metrics = train(tiny(*TINY_AUTOENCODING, f"logger={name}", tiny=False), tmp_path)
    assert [*tmp_path.glob(LEFT[name])] and not (tmp_path / "tensorboard").exists()
    if name == "csv":
        assert "lr: 0.001" in (tmp_path / "csv" / "hparams.yaml").read_text()
        saved = pd.read_csv(tmp_path / LEFT["csv"])["reconstruction"].dropna()
        assert [*saved] == [pytest.approx(metrics["reconstruction"])]


def test_train_without_logger(tiny, tmp_path):
    train(tiny(*TINY_AUTOENCODING, "~logger", tiny=False), tmp_path)
    assert not {"tensorboard", "csv", "lightning_logs"} & {path.name for path in tmp_path.iterdir()}
