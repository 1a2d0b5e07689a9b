"""Search hyperparameters with Optuna, an example to copy and edit.

    pip install "optuna>=4"
    python experiments/search.py --study FOLDER --trials 20 experiment=digits_small_cpu

Edit :func:`suggest` for other values. Each trial is a run in ``FOLDER/trial-N``, so the same
command resumes an interrupted trial from its checkpoint, then asks for more.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import optuna
from optuna.trial import TrialState

from sj_taid.training.columns import METRICS
from sj_taid.training.config import compose
from sj_taid.training.run import Run


def suggest(trial: optuna.Trial) -> dict[str, object]:
    """The values of a trial, by their keys in the config."""
    return {
        "optimizer.lr": trial.suggest_float("optimizer.lr", 1e-4, 1e-2, log=True),
        "neuron_start.tau": trial.suggest_float("neuron_start.tau", 1.05, 4.0),
        "neuron": trial.suggest_categorical("neuron", ["lif", "plif", "alif"]),
    }


def main(arguments: Sequence[str] | None = None) -> optuna.Study:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", type=Path, required=True, help="folder of study and trials")
    parser.add_argument("--trials", type=int, default=20, help="in the end, failed ones included")
    parser.add_argument("overrides", nargs="*", help="of all trials, as for sj-taid train")
    options = parser.parse_args(arguments)
    folder = options.study.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    objective = compose("train", options.overrides).objective
    less = objective not in METRICS or METRICS[objective].less_is_better
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'study.db'}",
        study_name="search",
        direction="minimize" if less else "maximize",
        load_if_exists=True,
    )
    if not objective.startswith("validation_"):
        print(f"{objective} is measured on the test set, so what is chosen by it is too")

    def attempt(number: int, values: dict[str, object]) -> None:
        run = Run(folder / f"trial-{number}")
        overrides = [*options.overrides, *(f"{key}={value}" for key, value in values.items())]
        command = ["train", *overrides, f"hydra.run.dir='{run.folder}'"]
        subprocess.run([sys.executable, "-m", "sj_taid", *command], check=False)
        value = run.metrics.get(objective) if run.is_finished else None
        study.tell(number, value, TrialState.FAIL if value is None else None)

    for interrupted in study.get_trials(states=[TrialState.RUNNING]):
        attempt(interrupted.number, interrupted.params)
    while len(study.trials) < options.trials:
        trial = study.ask()
        attempt(trial.number, suggest(trial))
    if study.get_trials(states=[TrialState.COMPLETE]):
        best = study.best_trial
        print(f"best: {best.value:.4g} by {best.params}, trial-{best.number}")
    return study


if __name__ == "__main__":
    main()
