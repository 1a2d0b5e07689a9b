"""The figures that are kept, and RESULTS.md, which is made of them."""

import pytest

from experiments import report
from sj_taid.training import compare as results
from sj_taid.training import run
from tests.training.conftest import metrics


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """results/ and RESULTS.md in a place of their own."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "REPORT", tmp_path / "RESULTS.md")
    return tmp_path


def test_experiments_are_kept_by_their_choices(runs, kept, capsys):
    run.save_metrics(metrics(["neuron=lif"], fad=1.0), runs / "no experiment")
    (runs / "no experiment" / run.CONFIG).write_text("seed: 0\n")
    report.main([str(runs)])
    assert "is no run of an experiment in conf/experiment" in capsys.readouterr().out
    assert sorted(path.name for path in (kept / "results" / "mnist_small_cpu").iterdir()) == [
        "neuron=lif,seed=0.json",
        "neuron=lif,seed=1.json",
        "seed=0.json",
        "seed=1.json",
    ]
    made = (kept / "RESULTS.md").read_text()
    for line in (
        "| alif | 99.73 ± 0.07 | 7.50 ± 0.71 | 2 | 0.83 | 1.5 | 2 |",
        "1. fad: by hand",
        "mnist_small_cpu seed=1` | 1 | 0123456789ab | a laptop | 1 |",
    ):
        assert f"{line}\n" in made


def test_each_run_tells_its_protocols_and_its_later_evaluation():
    other = metrics(["seed=1"]) | {"protocol": {"fad": "by eye", "reconstruction": "by hand"}}
    later = {"command": "evaluate.py", "commit": "later", "machine": "a desk", "threads": 2}
    other["evaluations"] = [later | {"figures": ["fad"]}]
    made = report.runs_section([metrics(["seed=0"]), other])
    assert made.startswith("1. fad: by eye\n2. fad: by hand\n3. reconstruction: by hand\n\n")
    assert [line.split("` | ")[1] for line in made.splitlines()[-3:]] == [
        "2 | 0123456789ab | a laptop | 1 |",
        "3 | 0123456789ab | a laptop | 1 |",
        "1 | later | a desk | 2 |",
    ]


def test_figures_of_different_protocols_are_not_compared(runs):
    finished, _ = results.gather([runs])
    first, *others = finished.values()
    assert "FAD ↓" in results.table([first, *others])[0]
    first["protocol"] = {"fad": "by eye"}
    assert "FAD ↓ (of different protocols)" in results.table([first, *others])[0]
    assert report.changes([first, *others])[1][2] == "-4.00"  # the pair of seed 1 alone


def test_what_a_choice_changes(runs):
    finished, _ = results.gather([runs])
    # Pairs of equal seed: 7 - 10 and 8 - 12. LIF has no accuracy to compare with.
    assert report.changes(list(finished.values()))[1:] == [
        ["`alif` instead of `lif`", "", "-3.50 ± 0.71", "2"]
    ]


def test_ours_stand_below_the_published_figures(kept, tiny, monkeypatch):
    cfg = tiny("+published={source: a paper, fad: 35.54, accuracy: 0.9978}")
    monkeypatch.setattr(report, "experiments", lambda: {"row": cfg})
    before = report.paper_section("mnist", "generation", {"row": cfg})
    assert "| `row` | a paper | 99.78 |  |  |  | 35.54 |  |  |  |  |\n" in before
    assert "|  | ours: not run |" in before

    report.keep(metrics(["experiment=row"], fad=40.0))
    report.keep(metrics(["experiment=row", "neuron=lif", "seed=1"], fad=50.0))
    after = report.paper_section("mnist", "generation", {"row": cfg})
    assert (
        "|  | ours |  |  |  |  | 40.00 | 2 | 0.83 | 1.5 | 1 |" in after and "not run" not in after
    )
    assert "|  | ours, with `neuron=lif` |  |  |  |  | 50.00 | 2 |" in after
    assert "| ESVAE, not in this project | " in after and " | 10.99 | " in after


def test_the_report_is_what_the_script_makes_of_the_committed_figures():
    assert report.REPORT.read_text(encoding="utf-8") == report.text(), (
        "run python experiments/report.py and commit RESULTS.md"
    )
    assert {p.name for p in report.RESULTS.iterdir() if p.is_dir()} <= report.experiments().keys()
