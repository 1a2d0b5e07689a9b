"""A search by Optuna over runs: what it varies, and that it goes on after a kill."""

from types import SimpleNamespace

import optuna
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib import image as mpimg
from omegaconf import OmegaConf

from sj_taid.training import run, search
from sj_taid.training.composing import CONF, compose
from tests.training.conftest import TINY_CLASSIFICATION

SPACE = ["optimizer.lr=tag(log, interval(1e-4, 1e-1))", "neuron=alif,lif"]


def load(folder):
    return optuna.load_study(study_name="search", storage=f"sqlite:///{folder / 'study.db'}")


def test_a_killed_search_goes_on_with_its_trials(sj_taid, tmp_path, monkeypatch, capsys):
    started = []

    def trial_here(command, check):
        started.append(command)
        if len(started) == 2:
            raise KeyboardInterrupt  # as a kill: nothing more is written
        quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none", "callbacks=quiet", "~logger"]
        sj_taid("train", *command[len(search.TRAIN) :], *quiet)

    monkeypatch.setattr(search, "subprocess", SimpleNamespace(run=trial_here))
    arguments = ["search", f"--study={tmp_path}", "--trials=3", *TINY_CLASSIFICATION, *SPACE]
    with pytest.raises(KeyboardInterrupt):
        sj_taid(*arguments)
    assert [trial.state.name for trial in load(tmp_path).trials] == ["COMPLETE", "RUNNING"]

    sj_taid(*arguments)
    assert len(started) == 4 and started[1] == started[2] != started[3]
    study = load(tmp_path)
    assert study.direction.name == "MAXIMIZE" and len(study.trials) == 3
    for trial in study.trials:
        there = run.Run(tmp_path / f"trial-{trial.number}")
        assert trial.value == there.metrics["validation_accuracy"]
        assert there.config.optimizer.lr == trial.params["optimizer.lr"]
    assert f"trial-{study.best_trial.number}" in capsys.readouterr().out
    for name in ("history.png", "importance.png"):
        assert mpimg.imread(tmp_path / name).std() > 0
    sj_taid(*arguments)
    assert len(started) == 4


def test_a_failed_trial_is_told(sj_taid, tmp_path, monkeypatch):
    nothing = SimpleNamespace(run=lambda command, check: None)
    monkeypatch.setattr(search, "subprocess", nothing)
    with pytest.raises(SystemExit, match="no trial ended"):
        sj_taid("search", f"--study={tmp_path}", "--trials=1")
    (trial,) = load(tmp_path).trials
    assert trial.state.name == "FAIL"
    assert trial.params.keys() == {
        "neuron_start.tau", "neuron_start.v_threshold", "optimizer.lr", "decoder",
    }  # fmt: skip
    assert 1e-4 <= trial.params["optimizer.lr"] <= 1e-2


def test_what_the_preset_varies_is_there():
    for override in OverridesParser.create().parse_overrides(
        OmegaConf.to_container(OmegaConf.load(f"{CONF}/search.yaml"))
    ):
        if override.is_discrete_sweep():
            values = list(override.sweep_string_iterator())
        else:
            values = [override.value().start, override.value().end]
        for value in values:
            compose("train", [f"{override.get_key_element()}={value}"])
