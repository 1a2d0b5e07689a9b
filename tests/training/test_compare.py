"""Gathering runs, their tables, and the command that compares them."""

import pandas as pd
import pytest
from matplotlib import image as mpimg

from sj_taid.training import columns, compare, gather, report, run, tables
from tests.training.conftest import cells, metrics


def write(content, folder):
    """A finished run of these metrics."""
    written = run.Run(folder)
    written.save_metrics(content)
    (folder / run.CONFIG).write_text("seed: 0\n")
    return written


# ---- gather ----


def test_gather_counts_a_run_once_however_its_folder_is_named(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs)
    finished, left_out = gather.gather([runs, runs / ".." / runs.name, tmp_path / "link"])
    assert len(finished) == 4 and len(left_out) == 2


def test_gather_for_command_refuses_folders_without_a_finished_run(tmp_path, capsys):
    (tmp_path / run.CONFIG).write_text("seed: 0\n")
    for folder, said in (("nowhere", "no run below "), (".", "no finished")):
        with pytest.raises(SystemExit):
            compare.main([str(tmp_path / folder)])
        assert f"error: {said}" in capsys.readouterr().err


ORIGIN = '"command": "", "overrides": [], "choices": {}'


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (run.METRICS, '{"fad": 1.0}', "lacks command, overrides and choices"),
        (run.METRICS, f"{{{ORIGIN}}}", "has none of accuracy, accuracy_best_test"),
        (run.METRICS, "", "is damaged"),
        (run.METRICS, "[" * 10**5, "recursion"),
        (run.CONFIG, "[" * 10**4, "recursion"),
        (f"{run.EVALUATIONS}/1.json", "[1]", "JSON that sj-taid evaluate did not write"),
        (f"{run.EVALUATIONS}/1.json", "{", "1.json is damaged"),
        (run.CONFIG, "a: [}", "config.yaml is damaged"),
        (run.CONFIG, "a: ${", "config.yaml is damaged"),
        (run.CONFIG, "- 1", "config.yaml is damaged"),
        (run.CONFIG, b"\xff\xfe", "codec can't decode"),
    ],
)
def test_gather_leaves_out_a_damaged_run_with_the_reason(tmp_path, file, content, reason):
    write(metrics([], fad=3.5), tmp_path)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    finished, left_out = gather.gather([tmp_path])
    assert not finished and reason in left_out[tmp_path]


def test_gather_counts_the_evaluations_of_the_checkpoints_that_are_here(tmp_path):
    there = write(metrics([], fad=3.5), tmp_path)
    evaluation = {"metrics": {"fad": 3.0}, "protocol": {"fad": "by eye"}}
    there.save_evaluation(evaluation | {"checkpoint_sha256": "of one that is not here"})
    read = gather.read(there)  # without any checkpoint all count
    assert read["fad"] == 3.0 and read["protocol"]["fad"] == "by eye"
    there.checkpoint.parent.mkdir()
    there.checkpoint.write_bytes(b"now")
    assert gather.read(there)["fad"] == 3.5
    now = {"metrics": {"fad": 2.5}, "protocol": {}, "checkpoint_sha256": there.checkpoint_sha256()}
    there.save_evaluation(now)
    there.best.write_bytes(b"the best")
    digest = run.Run(tmp_path, there.best).checkpoint_sha256()
    best = {"metrics": {"accuracy_best_validation_epoch": 0.5}, "protocol": {}}
    there.save_evaluation(best | {"checkpoint_sha256": digest})
    read = gather.read(there)
    assert (read["fad"], read["accuracy_best_validation_epoch"]) == (2.5, 0.5)


# ---- tables ----


def test_summary_keeps_protocols_apart(runs):
    first, *others = gather.gather([runs])[0].values()
    assert "FAD, own autoencoder ↓" in tables.summary([first, *others])
    first["protocol"] = {"fad": "by eye"}
    mixed = tables.summary([first, *others])
    title = "FAD, own autoencoder ↓ (of different protocols)"
    assert {*mixed[title]} == {"7.50 ± 0.71", "10.00, 12.00"}


def test_frame_takes_a_choice_over_a_metric_of_its_name_and_over_a_folder():
    names = ["image_folder_cats", "image_folder_dogs"]
    two = [
        metrics(["dataset=image_folder", f"loss={loss}"], {"dataset": name}) | {"loss": 0.5}
        for loss, name in zip(("mse", "tet"), names, strict=True)
    ]
    table, keys = tables.frame(two)
    assert keys == ["dataset", "loss"]
    assert [*table["dataset"]] == names and [*table["loss"]] == ["mse", "tet"]


def test_columns_spread_counts_that_differ_and_sort_numbers_before_words():
    epochs = columns.COLUMNS["epochs"]
    assert [epochs.text(pd.Series(pair)) for pair in ([12, 20], [20, 20])] == ["16 ± 6", "20"]
    assert sorted(["taid", "16", "8"], key=columns.natural) == ["8", "16", "taid"]


# ---- the command ----


def test_compare_shows_mean_and_spread_over_seeds(runs, capsys):
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
    assert (runs / "results.md").read_text() in shown
    table = pd.read_csv(runs / "results.csv")[["fad", "neuron"]]
    assert table.to_numpy().tolist() == [[10, "lif"], [12, "lif"], [7, "alif"], [8, "alif"]]
    assert mpimg.imread(runs / "results.png").std() > 0


def test_compare_takes_a_single_run(tmp_path, sj_taid):
    write(metrics([], fad=3.5), tmp_path)
    sj_taid("compare", str(tmp_path), "--out", str(tmp_path / "out"))
    assert cells((tmp_path / "out" / "results.md").read_text())[2][:2] == ["3.50", "2"]


def test_compare_and_report_say_what_cannot_be_written(runs, tmp_path, capsys):
    (taken := tmp_path / "taken").write_text("")
    for command in (compare, report):
        with pytest.raises(SystemExit):
            command.main([str(runs), f"--out={taken}/below"])
        assert "taken" in capsys.readouterr().err.splitlines()[-1]
