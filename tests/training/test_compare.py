"""The metrics of runs: gathered, compared, kept, and filled into RESULTS.md."""

import csv
import html
import json
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path

import pandas as pd
import pytest
from matplotlib import image as mpimg

from sj_taid.training import cli, columns, compare, gather, report, results_page, run, tables
from tests.training.conftest import CONF, metrics

ROOT = CONF.parent
PROVENANCE = ["0123456789ab", "a laptop", "1"]


def write(content, folder):
    run.Run(folder).save_metrics(content)
    (folder / run.CONFIG).write_text("seed: 0\n")


def cells(markdown):
    """The rows of a table, without its padding."""
    return [re.split(r" *\| *", line.strip("| ")) for line in markdown.splitlines()]


def test_mean_and_spread_over_seeds_for_every_choice(runs, capsys):
    compare.main([str(runs)])
    shown = capsys.readouterr().out
    assert "broken (metrics.json is damaged" in shown and "unfinished (unfinished)" in shown

    head, _, *rows = cells((runs / "results.md").read_text())
    assert head[:3] == ["neuron", "accuracy, last epoch, % ↑", "FAD, own autoencoder ↓"]
    assert head[3:] == ["epochs", "parameters, M", "training, min", "runs"]
    # By hand: the mean of 10 and 12 is 11, their standard deviation sqrt(2).
    assert rows == [
        ["lif", "", "11.00 ± 1.41", "2", "0.83", "1.5", "2"],
        ["alif", "99.73 ± 0.07", "7.50 ± 0.71", "2", "0.83", "1.5", "2"],
    ]
    # Whole headings and cells, though a pipe has no width.
    assert all(cell in shown for row in (head, *rows) for cell in row)
    assert len([line for line in shown.splitlines() if "11.00 ± 1.41" in line]) == 1
    with (runs / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["fad"] for row in table] == ["10.0", "12.0", "7.0", "8.0"]
    assert [row["neuron"] for row in table] == ["lif", "lif", "alif", "alif"]
    assert mpimg.imread(runs / "results.png").std() > 0


def test_a_lone_run(tmp_path, monkeypatch):
    write(metrics([], fad=3.5), tmp_path)
    line = ["sj-taid", "compare", str(tmp_path), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", line)
    cli.main()
    assert cells((tmp_path / "out" / "results.md").read_text())[2][:2] == ["3.50", "2"]


def test_a_later_evaluation_counts(tmp_path):
    evaluation = {
        "figures": {"fad": 2.5},
        "protocol": {"fad": "by eye"},
        "checkpoint_sha256": "abc",
        "command": "sj-taid evaluate checkpoint=RUN",
        "commit": "later",
        "machine": "a desk",
        "threads": 2,
    }
    write(metrics([], fad=3.5), tmp_path)
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "1.json").write_text(json.dumps(evaluation))
    read = gather.read(tmp_path / run.METRICS)
    assert read["fad"] == 2.5 and read["protocol"]["fad"] == "by eye"
    made = results_page.every_run([read])
    assert made.startswith("1. fad: by eye\n\n")
    assert cells(made)[-2:] == [
        ["`python experiments/train.py`", "", *PROVENANCE],
        ["`sj-taid evaluate checkpoint=RUN`", "1", "later", "a desk", "2"],
    ]


def test_evaluations_of_a_checkpoint_that_is_gone_do_not_count(tmp_path):
    made = run.Run(tmp_path)
    write(metrics([], fad=3.5), tmp_path)
    made.checkpoint.parent.mkdir()
    made.checkpoint.write_bytes(b"now")
    for fad, digest in ((2.5, made.checkpoint_sha256()), (1.5, "of the one before")):
        evaluation = {"figures": {"fad": fad}, "protocol": {}, "checkpoint_sha256": digest}
        made.save_evaluation(evaluation)
    assert gather.read(tmp_path / run.METRICS)["fad"] == 2.5
    made.best.write_bytes(b"the best")
    chosen = {"figures": {"accuracy_best_validation_epoch": 0.5}, "protocol": {}}
    digest = run.Run(tmp_path, made.best).checkpoint_sha256()
    made.save_evaluation(chosen | {"checkpoint_sha256": digest})
    read = gather.read(tmp_path / run.METRICS)
    assert (read["fad"], read["accuracy_best_validation_epoch"]) == (2.5, 0.5)


@pytest.mark.parametrize("content", ["{}", "[1]", "{", '{"figures": {"fad": NaN}}'])
def test_a_damaged_evaluation_leaves_its_run_out_with_the_reason(tmp_path, content):
    write(metrics([], fad=3.5), tmp_path)
    (tmp_path / run.CONFIG).write_text("seed: 0\n")
    (tmp_path / run.EVALUATIONS).mkdir()
    (tmp_path / run.EVALUATIONS / "1.json").write_text(content)
    finished, left_out = gather.gather([tmp_path])
    assert not finished and "1.json" in left_out[tmp_path]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1, 2]", "lacks command and choices"),
        ('{"fad": 1.0}', "lacks command and choices"),
        ('{"command": "", "choices": {}, "fad": "low"}', "has 'low' for fad, not a number"),
        ('{"command": "", "choices": {}, "fad": NaN}', "holds NaN, so its run diverged"),
        ('{"command": "", "choices": {}}', "has none of accuracy, accuracy_best_test_epoch"),
        ("", "is damaged"),
    ],
)
def test_what_is_no_metrics_file_is_left_out_with_the_reason(tmp_path, content, reason):
    (tmp_path / run.METRICS).write_text(content)
    (tmp_path / run.CONFIG).write_text("seed: 0\n")
    finished, left_out = gather.gather([tmp_path])
    assert not finished and reason in left_out[tmp_path]


@pytest.mark.parametrize(
    "content",
    [b"a: [}", b"a: ${", b"- 1", b"\xff\xfe"],
    ids=["yaml", "interpolation", "list", "encoding"],
)
def test_gather_leaves_out_a_run_whose_config_is_damaged(runs, content, capsys):
    (runs / "1" / run.CONFIG).write_bytes(content)
    finished, left_out = gather.gather([runs])
    assert len(finished) == 3 and runs / "1" in left_out
    for command in (compare, report):
        command.main([str(runs)])
    assert f"left out: {runs / '1'} (" in capsys.readouterr().out
    assert left_out[runs / "1"] in html.unescape((runs / "report.html").read_text())


@pytest.mark.parametrize(
    ("folder", "message"), [("nowhere", "no folder .*nowhere"), (".", "no run below")]
)
def test_a_folder_without_runs(tmp_path, capsys, folder, message):
    with pytest.raises(FileNotFoundError, match=message):
        gather.gather([tmp_path / folder])
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path / folder)])
    assert "error: no" in capsys.readouterr().err


def test_a_run_counts_once_however_its_folder_is_named(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs)
    finished, left_out = gather.gather([runs, runs / ".." / runs.name, tmp_path / "link"])
    assert len(finished) == 4 and len(left_out) == 2


def test_a_place_that_cannot_be_written_is_an_error_of_the_command(runs, tmp_path, capsys):
    (taken := tmp_path / "taken").write_text("")
    for command in (compare, report):
        with pytest.raises(SystemExit):
            command.main([str(runs), f"--out={taken}/below"])
        assert "taken" in capsys.readouterr().err.splitlines()[-1]


def test_without_a_finished_run_there_is_nothing_to_compare(tmp_path, capsys):
    (tmp_path / run.CONFIG).write_text("seed: 0\n")
    with pytest.raises(SystemExit):
        compare.main([str(tmp_path)])
    assert "no finished run" in capsys.readouterr().err


def test_the_overrides_of_a_run_come_from_its_own_list_or_from_its_command():
    assert gather.overrides(metrics(["neuron=lif", "+x='a b'"])) == {"neuron": "lif", "x": "'a b'"}
    listed = metrics(["neuron=lif"]) | {"overrides": ["++decoder=taid"]}
    assert gather.overrides(listed) == {"decoder": "taid"}


def test_experiments_are_kept_by_their_choices(runs, tmp_path, monkeypatch, capsys):
    write(metrics(["neuron=lif"], fad=1.0), runs / "no experiment")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        compare.main([str(runs), "--keep"])
    assert "no RESULTS.md here" in capsys.readouterr().err
    shutil.copytree(ROOT / "results", "results", ignore=lambda *_: ["runs"])
    shutil.copy(ROOT / "RESULTS.md", tmp_path)
    compare.main([str(runs), "--keep"])
    assert "is no run of an experiment in conf/experiment" in capsys.readouterr().out
    assert sorted(path.name for path in Path("results/runs/mnist_small_cpu").iterdir()) == [
        "neuron-lif-seed-0.json",
        "neuron-lif-seed-1.json",
        "seed-0.json",
        "seed-1.json",
    ]
    made = Path("RESULTS.md").read_text()
    assert made.startswith("# Results\n") and "1. fad: by hand\n" in made
    for line in (
        ["alif", "99.73 ± 0.07", "7.50 ± 0.71", "2", "0.83", "1.5", "2"],
        ["`python experiments/train.py experiment=mnist_small_cpu seed=1`", "1", *PROVENANCE],
    ):
        assert line in cells(made)


def test_names_of_kept_runs_can_be_given_on_any_command_line():
    for name in (path.stem for path in ROOT.glob("results/**/*.*")):
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,120}", name), name


def test_values_of_different_protocols_are_not_compared(runs):
    first, *others = gather.gather([runs])[0].values()
    assert "FAD, own autoencoder ↓" in tables.summary([first, *others])
    first["protocol"] = {"fad": "by eye"}
    mixed = tables.summary([first, *others])
    title = "FAD, own autoencoder ↓ (of different protocols)"
    assert {*mixed[title]} == {"7.50 ± 0.71", "10.00, 12.00"}
    changes = tables.changes([first, *others])
    assert changes.iloc[0, 2] == "-4.00"  # the pair of seed 1 alone


def test_a_choice_that_is_named_as_a_figure_is_the_choice():
    made = [metrics([f"loss={loss}", "seed=0"]) | {"loss": 0.5} for loss in ("mse", "tet")]
    table, keys = tables.frame(made)
    assert keys == ["loss"] and [*table["loss"]] == ["mse", "tet"]


def test_two_folders_of_images_have_rows_of_their_own():
    names = ["image_folder_cats", "image_folder_dogs"]
    made = [metrics(["dataset=image_folder"], {"dataset": name}, fad=1.0) for name in names]
    assert [*tables.summary(made)["dataset"]] == names


def test_in_the_papers_tables_figures_of_different_protocols_stand_apart():
    choices = {"dataset": "mnist", "task": "generation"}
    made = [metrics(["experiment=fsvae"], choices, fad=fad) for fad in (1.0, 2.0, 4.0)]
    made[2]["protocol"] = {"fad": "by eye"}
    published = pd.DataFrame(columns=["dataset", "task", "row", "source", "figure", "value"])
    (section,) = results_page.paper_sections(made, published)
    assert "1.50 ± 0.71, 4.00" in section


def test_what_taid_changes_in_esvae_counts_no_run_of_other_choices():
    name, decoders = "mnist_esvae_cpu", {"fixed": 0.04, "taid": 0.05}

    def run_of(decoder, error, *more):
        choices = {"dataset": "mnist", "decoder": decoder}
        given = [f"experiment={name}", f"decoder={decoder}", *more]
        return metrics(given, choices, reconstruction=error, fad_published=2 * error)

    made = [run_of(*one) for one in decoders.items()]
    made.append(run_of("taid", 9.0, "model.latent_channels=128"))
    made = results_page.decoders(defaultdict(list, {name: made}))
    assert cells(made)[-1] == ["`*_esvae_cpu`", "`taid`", "+25.0", "+25.0"]
    assert results_page.decoders(defaultdict(list)) == results_page.not_run(
        {"mnist_esvae_sharp": []}
    )


def test_what_a_choice_changes(runs):
    finished, _ = gather.gather([runs])
    # Pairs of equal seed: 7 - 10 and 8 - 12. LIF has no accuracy to compare with.
    assert tables.changes(list(finished.values())).to_numpy().tolist() == [
        ["`alif` instead of `lif`", "", "-3.50 ± 0.71", "2"]
    ]


def test_ours_stand_above_the_published_values_and_fad_in_columns_of_its_own():
    published = pd.read_csv(ROOT / "results" / "published.csv")
    (nothing_of_ours,) = (
        s for s in results_page.paper_sections([], published) if "### mnist: g" in s
    )
    assert "ours" not in nothing_of_ours and "FAD, own" not in nothing_of_ours
    choices = {"dataset": "mnist", "task": "generation"}
    ours = [
        metrics(["experiment=fsvae"], choices, fad=40.0),
        metrics(["experiment=fsvae", "neuron=lif"], choices, 1, fad=50.0),
    ]
    section, *others = results_page.paper_sections(ours, published)
    assert section.startswith("### mnist: generation\n") and len(others) >= 4
    head, _, *rows = cells(section.partition("\n\n")[2])
    own, as_published = (
        head.index(f"FAD{which} ↓") for which in (", own autoencoder", " as published")
    )
    assert [(row[1], row[own], row[as_published]) for row in rows if row[0].lower() == "fsvae"] == [
        ("ours", "40.00", ""),
        ("ours, with `neuron=lif`", "50.00", ""),
        ("Kamata et al. 2022, arXiv 2110.00375", "", "35.54"),
    ]
    assert next(row for row in rows if row[0] == "ESVAE")[as_published] == "10.99"


def test_what_is_not_run_takes_one_line():
    made = results_page.tables(ROOT)
    for name in ("small", "papers"):
        *measured, last = made[name].splitlines()
        assert last.startswith("Not run: ") and not any("ot run" in row for row in measured)


def test_every_published_value_has_its_place():
    published = pd.read_csv(ROOT / "results" / "published.csv")
    assert set(published["figure"]) <= columns.COLUMNS.keys()
    assert set(published["row"][published["command"].isna()]) == {"FSDDIM"}
    assert published["source"].notna().all() and (published["value"] > 0).all()


def test_results_are_what_is_made_of_the_kept_runs():
    page = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert page == results_page.fill(page, results_page.tables(ROOT)), "run sj-taid compare --keep"
    assert {path.name for path in (ROOT / "results/runs").iterdir()} <= gather.EXPERIMENTS.keys()


def test_counts_have_a_spread_where_they_differ():
    epochs = columns.COLUMNS["epochs"]
    assert epochs.text(pd.Series([12, 20])) == "16 ± 6"
    assert epochs.text(pd.Series([20, 20])) == "20"


def test_yardsticks_stand_side_by_side_in_their_order(tmp_path):
    rows = ["mnist,z,1.005,0.1", "mnist,a,2,0.2", "fashion_mnist,z,3,0.3", "fashion_mnist,a,4,0.4"]
    path = tmp_path / "yardsticks.csv"
    assert results_page.yardsticks(path) == "Not run: `yardsticks`.\n"
    path.write_text("\n".join(["dataset,images,fad_published,gradient", *rows]))
    _, _, *made = [line.split() for line in results_page.yardsticks(path).splitlines()]
    assert [row[1::2] for row in made] == [
        ["z", "3.00", "1.00", "0.300", "0.100"],
        ["a", "4.00", "2.00", "0.400", "0.200"],
    ]
