"""The example of a search: Optuna's values reach the runs, and an interrupted trial is resumed."""

from types import SimpleNamespace

import pytest
import search

from sj_taid.training.run import Run
from tests.training.conftest import TINY_CLASSIFICATION


@pytest.fixture
def trials(monkeypatch):
    """The command lines of the trials; a value in ``outcomes`` is its objective or an error."""
    begun, outcomes = [], {}

    def run(command, check):
        begun.append(command)
        outcome = outcomes.pop(len(begun), 0.5)
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is not None:
            folder = command[-1].removeprefix("hydra.run.dir=").strip("'")
            Run(folder).save_metrics({"validation_accuracy": outcome})

    monkeypatch.setattr(search, "subprocess", SimpleNamespace(run=run))
    return SimpleNamespace(begun=begun, outcomes=outcomes)


def test_search_resumes_an_interrupted_trial_and_counts_a_failed_one(trials, tmp_path, capsys):
    arguments = [f"--study={tmp_path}", "--trials=3", *TINY_CLASSIFICATION]
    trials.outcomes |= {1: KeyboardInterrupt(), 3: None, 4: 0.75}
    with pytest.raises(KeyboardInterrupt):
        search.main(arguments)
    study = search.main(arguments)
    assert trials.begun[0] == trials.begun[1]
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert study.direction.name == "MAXIMIZE" and study.best_trial.number == 2
    for key, value in study.best_params.items():
        assert f"{key}={value}" in trials.begun[-1]
    assert "best: 0.75" in capsys.readouterr().out


def test_search_minimizes_an_error_and_says_that_it_is_of_the_test_set(tmp_path, capsys):
    study = search.main([f"--study={tmp_path}", "--trials=0"])
    assert study.direction.name == "MINIMIZE"
    assert "fad is measured on the test set" in capsys.readouterr().out


@pytest.mark.slow
def test_search_trains(tmp_path):
    study = search.main(
        [f"--study={tmp_path}", "--trials=1", *TINY_CLASSIFICATION, "callbacks=quiet"]
    )
    run = Run(tmp_path / "trial-0")
    assert study.best_value == run.metrics["validation_accuracy"]
    assert run.config.optimizer.lr == study.best_params["optimizer.lr"]
