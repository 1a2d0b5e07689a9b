"""The figures of runs, gathered and compared."""

import csv

import pytest
from matplotlib import image as mpimg

from sj_taid.training import compare as results
from sj_taid.training import run
from tests.training.conftest import metrics


def test_mean_and_spread_over_seeds_for_every_choice(runs, capsys):
    results.main([str(runs)])
    shown = capsys.readouterr().out
    assert "broken (metrics.json is damaged" in shown and "unfinished (unfinished)" in shown

    head, _, *rows = (runs / "results.md").read_text().splitlines()
    assert head == (
        "| neuron | accuracy, % ↑ | FAD ↓ | epochs | parameters, M | training, min | runs |"
    )
    # By hand: the mean of 10 and 12 is 11, their standard deviation sqrt(2).
    assert rows == [
        "| lif |  | 11.00 ± 1.41 | 2 | 0.83 | 1.5 | 2 |",
        "| alif | 99.73 ± 0.07 | 7.50 ± 0.71 | 2 | 0.83 | 1.5 | 2 |",
    ]
    with (runs / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["fad"] for row in table] == ["10.0", "12.0", "7.0", "8.0"]
    assert [row["neuron"] for row in table] == ["lif", "lif", "alif", "alif"]
    assert mpimg.imread(runs / "results.png").std() > 0


def test_a_lone_run_and_one_that_diverged(tmp_path):
    run.save_metrics(metrics([], fad=float("nan")), tmp_path)
    (tmp_path / run.CONFIG).write_text("seed: 0\n")
    results.main([str(tmp_path), "--out", str(tmp_path / "out")])
    assert "| nan | 2 |" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "lacks command and choices"),
        ('{"fad": 1.0}', "lacks command and choices"),
        ('{"command": "", "choices": {}, "fad": "low"}', "has 'low' for fad, not a number"),
        ('{"command": "", "choices": {}}', "has none of accuracy, reconstruction"),
        ("", "is damaged"),
    ],
)
def test_what_is_no_metrics_file_is_left_out_with_the_reason(tmp_path, content, reason):
    (tmp_path / run.METRICS).write_text(content)
    (tmp_path / run.CONFIG).write_text("seed: 0\n")
    finished, left_out = results.gather([tmp_path])
    assert not finished and reason in left_out[tmp_path]


@pytest.mark.parametrize(
    ("folder", "message"), [("nowhere", "no folder .*nowhere"), (".", "no run below")]
)
def test_a_folder_without_runs(tmp_path, capsys, folder, message):
    with pytest.raises(FileNotFoundError, match=message):
        results.gather([tmp_path / folder])
    with pytest.raises(SystemExit):
        results.main([str(tmp_path / folder)])
    assert "error: no" in capsys.readouterr().err


def test_without_a_finished_run_there_is_nothing_to_compare(tmp_path, capsys):
    (tmp_path / run.CONFIG).write_text("seed: 0\n")
    with pytest.raises(SystemExit):
        results.main([str(tmp_path)])
    assert "no finished run" in capsys.readouterr().err
