"""A search by Optuna over runs: what it varies, and that it goes on after a kill."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from types import SimpleNamespace

import optuna
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from matplotlib import image as mpimg
from omegaconf import OmegaConf

from sj_taid.training import run, search
from sj_taid.training.commands import train
from sj_taid.training.composing import CONF, compose
from tests.training.conftest import (
    ENVIRONMENT,
    TINY_CLASSIFICATION,
    assert_same_weights,
    weights,
)

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


@pytest.mark.slow
def test_a_search_that_is_killed_in_a_trial_goes_on_and_loses_nothing(tiny, tmp_path):
    job = [*TINY_CLASSIFICATION, "trainer.max_epochs=12", "dataset.augment=affine", "~logger"]
    arguments = ["search", f"--study={tmp_path / 'study'}", "--trials=2", *job, *SPACE]
    program = "from sj_taid.training.cli import main; main()"
    command = [sys.executable, "-c", program, *arguments]
    first = run.Run(tmp_path / "study" / "trial-0")
    with subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True) as process:
        while process.poll() is None and not first.checkpoint.is_file():
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)  # the search and the trial
    assert process.returncode == -signal.SIGKILL and not (first.folder / run.METRICS).exists()
    (killed,) = load(tmp_path / "study").trials
    assert killed.state.name == "RUNNING"

    subprocess.run(command, env=ENVIRONMENT, check=True)
    study = load(tmp_path / "study")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    assert study.trials[0].params == killed.params
    assert study.trials[0].value == first.metrics["validation_accuracy"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(tiny(*killed.user_attrs["overrides"], tiny=False), tmp_path / "undisturbed")
    torch.set_num_threads(threads)
    assert_same_weights(first.folder, weights(tmp_path / "undisturbed"))


@pytest.fixture
def trials(sj_taid, tmp_path, monkeypatch):
    """A search whose trials do what they are told, by number; those that were begun."""
    begun, does, commands = [], {}, []

    def begin(command, check):
        commands.append(command)
        number = len(begun)
        begun.append(command[-1])
        does.get(number, lambda: None)()
        folder = command[-1].removeprefix("hydra.run.dir=").strip("'")
        run.Run(folder).save_metrics({"validation_accuracy": 0.5})

    monkeypatch.setattr(search, "subprocess", SimpleNamespace(run=begin))
    arguments = ["search", f"--study={tmp_path}", "--trials=2", *TINY_CLASSIFICATION, *SPACE]
    told = {"begun": begun, "does": does, "commands": commands}
    return SimpleNamespace(**told, search=lambda: sj_taid(*arguments))


def interrupt():
    raise KeyboardInterrupt


def test_a_trial_that_outlived_its_search_is_waited_for_and_told(trials, tmp_path):
    trials.does[0] = interrupt  # the search alone
    with pytest.raises(KeyboardInterrupt):
        trials.search()
    with ExitStack() as still_runs:
        still_runs.enter_context(run.Run(tmp_path / "trial-0").lock())
        trials.does[1] = still_runs.close
        trials.search()
    assert [trial.state.name for trial in load(tmp_path).trials] == ["COMPLETE"] * 2
    assert [place.split("trial-")[1] for place in trials.begun] == ["0'", "1'", "0'"]


def test_a_second_search_leaves_the_trials_of_the_first_alone(trials, tmp_path):
    trials.does[0] = trials.search  # begins while the first trial has not locked its folder yet
    trials.search()
    assert [trial.state.name for trial in load(tmp_path).trials] == ["COMPLETE"] * 2
    assert sorted(trials.begun) == sorted(set(trials.begun)) and len(trials.begun) == 2


def test_failed_trials_are_told_do_not_count_and_end_the_search(sj_taid, tmp_path, monkeypatch):
    nothing = SimpleNamespace(run=lambda command, check: None)
    monkeypatch.setattr(search, "subprocess", nothing)
    for n in (5, 10):
        with pytest.raises(SystemExit, match="5 trials in a row failed"):
            sj_taid("search", f"--study={tmp_path}", "--trials=1")
        trials = load(tmp_path).trials
        assert [trial.state.name for trial in trials] == ["FAIL"] * n
    trial = trials[0]
    assert trial.params.keys() == {
        "neuron_start.tau", "neuron_start.v_threshold", "optimizer.lr", "decoder",
    }  # fmt: skip
    assert 1e-4 <= trial.params["optimizer.lr"] <= 1e-2


def test_a_study_is_of_one_search(trials, sj_taid, tmp_path):
    trials.search()
    arguments = ["search", f"--study={tmp_path}", "--trials=3", *TINY_CLASSIFICATION, *SPACE]
    for other in ("seed=3", "neuron=alif,lif,plif", "objective=validation_loss"):
        with pytest.raises(SystemExit, match=r"another search: they differ in .*another --study"):
            sj_taid(*arguments, other)
    sj_taid(*arguments, "cache_dir=elsewhere")  # a place is no choice
    assert len(load(tmp_path).trials) == 3


def test_a_search_takes_choices_of_ones_own_and_whole_numbers(trials, sj_taid, tmp_path):
    own = tmp_path / "own"
    (own / "neuron").mkdir(parents=True)
    (own / "neuron" / "mine.yaml").write_text("_target_: mypkg.MyLIF\n")
    folder = tmp_path / "study"
    space = ["model.T=int(interval(2, 9))", "neuron=mine"]
    where = [f"--study={folder}", "--trials=4", "--config-dir", str(own)]
    sj_taid("search", *where, *TINY_CLASSIFICATION, *space)
    for trial in load(folder).trials:
        assert f"model.T={int(trial.params['model.T'])}" in trial.user_attrs["overrides"]
    assert trials.commands[-1][: len(search.TRAIN) + 2] == [*search.TRAIN, "--config-dir", str(own)]


def test_a_classifier_has_no_decoder_to_search_for(trials, sj_taid, tmp_path):
    sj_taid("search", f"--study={tmp_path}", "--trials=1", *TINY_CLASSIFICATION)
    (trial,) = load(tmp_path).trials
    assert trial.params.keys() == {
        "neuron_start.tau", "neuron_start.v_threshold", "optimizer.lr",
    }  # fmt: skip


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
