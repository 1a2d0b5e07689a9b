"""Gathering runs, their tables, and the command that compares them."""

import pandas as pd
import pytest

from sj_taid.training import columns, compare, run
from tests.training.conftest import cells, metrics


@pytest.fixture
def single(tmp_path):
    """A finished run."""
    written = run.Run(tmp_path)
    written.save_metrics(metrics([], fad=3.5))
    (tmp_path / run.CONFIG).write_text("seed: 0\n")
    return written


# ---- gather ----


def test_gather_counts_a_run_once_however_its_folder_is_named(runs, tmp_path):
    (tmp_path / "link").symlink_to(runs)
    finished, left_out = compare.gather([runs, runs / ".." / runs.name, tmp_path / "link"])
    assert len(finished) == 4 and len(left_out) == 2


ORIGIN = '"command": "", "overrides": [], "choices": {}'


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        (run.METRICS, b'{"fad": 1.0}', "lacks command, overrides and choices"),
        (run.METRICS, f"{{{ORIGIN}}}".encode(), "has none of accuracy, accuracy_best_test"),
        (run.METRICS, b"", "is damaged"),
        (run.METRICS, b"[" * 10**5, "metrics.json is damaged: maximum recursion depth"),
        (run.METRICS, b"[1]", "lacks command, overrides and choices"),
        (run.CONFIG, b"[" * 10**4, "config.yaml is damaged: maximum recursion depth"),
        (run.CONFIG, b"a: &a [x]\nb: [*a, *a]", "config.yaml is damaged: it has aliases"),
        (run.CONFIG, b"", "config.yaml is damaged: it holds no keys"),
        (f"{run.EVALUATIONS}/1.json", b"[1]", "JSON that sj-taid evaluate did not write"),
        (f"{run.EVALUATIONS}/1.json", b"{", "1.json is damaged"),
        (run.CONFIG, b"a: [}", "config.yaml is damaged"),
        (run.CONFIG, b"a: ${", "config.yaml is damaged"),
        (run.CONFIG, b"- 1", "config.yaml is damaged"),
        (run.CONFIG, b"\xff\xfe", "codec can't decode"),
    ],
)
def test_gather_leaves_out_a_damaged_run_with_the_reason(single, capsys, file, content, reason):
    (single.folder / file).parent.mkdir(exist_ok=True)
    (single.folder / file).write_bytes(content)
    with pytest.raises(FileNotFoundError, match=f"no finished run below {single.folder}; an"):
        compare.gather([single.folder])
    left_out = capsys.readouterr().out
    assert left_out.startswith(f"left out: {single.folder} (") and reason in left_out


def test_gather_counts_the_evaluations_of_the_checkpoints_that_are_here(single):
    evaluation = {"metrics": {"fad": 3.0}, "protocol": {"fad": "by eye"}}
    single.save_evaluation(evaluation | {"checkpoint_sha256": "of one that is not here"})
    read = compare.read(single)  # without any checkpoint all count
    assert read["fad"] == 3.0 and read["protocol"]["fad"] == "by eye"
    single.checkpoint.parent.mkdir()
    single.checkpoint.write_bytes(b"now")
    assert compare.read(single)["fad"] == 3.5
    single.best.write_bytes(b"the best")
    for there, name in ((single, "fad"), (run.Run(single.folder, single.best), "accuracy")):
        digest = {"checkpoint_sha256": there.checkpoint_sha256()}
        single.save_evaluation({"metrics": {name: 0.5}, "protocol": {}} | digest)
    read = compare.read(single)
    assert (read["fad"], read["accuracy"]) == (0.5, 0.5)
    # Made while the clock was ahead: the next counts on from it.
    path = single.save_evaluation({"metrics": {"fad": 2.0}, "protocol": {}} | digest)
    path.rename(path.with_name("2130-01-01.json"))
    single.save_evaluation({"metrics": {"fad": 1.0}, "protocol": {}} | digest)
    assert compare.read(single)["fad"] == 1.0


# ---- tables ----


def test_summary_keeps_protocols_apart(runs):
    first, *others = compare.gather([runs])[0].values()
    assert "FAD, own autoencoder ↓" in compare.summary([first, *others])
    first["protocol"] = {"fad": "by eye"}
    mixed = compare.summary([first, *others])
    title = "FAD, own autoencoder ↓ (of different protocols)"
    assert {*mixed[title]} == {"7.50 ± 0.71", "10.00, 12.00"}


def test_frame_takes_a_choice_over_a_metric_of_its_name_and_over_a_folder():
    names = ["image_folder_cats", "image_folder_dogs"]
    two = [
        metrics(["dataset=image_folder", f"+loss={loss}"], {"dataset": name}) | {"loss": 0.5}
        for loss, name in zip(("mse", "tet"), names, strict=True)
    ]
    table, keys = compare.frame(two)
    assert keys == ["dataset", "loss"]
    assert [*table["dataset"]] == names and [*table["loss"]] == ["mse", "tet"]


def test_column_text_spreads_counts_that_differ():
    epochs = columns.COLUMNS["epochs"]
    assert [epochs.text(pd.Series(pair)) for pair in ([12, 20], [20, 20])] == ["16 ± 6", "20"]


# ---- the command ----


def test_compare_shows_mean_and_spread_over_seeds(runs, capsys):
    compare.main([str(runs)])
    shown = capsys.readouterr().out
    assert "broken/metrics.json is damaged" in shown and "unfinished (unfinished)" in shown
    written = (runs / "results.md").read_text()
    assert written in shown
    head, _, *rows = cells(written)
    assert head[:3] == ["neuron", "accuracy, last epoch, % ↑", "FAD, own autoencoder ↓"]
    assert head[3:] == ["epochs", "parameters, M", "training, min", "runs"]
    # By hand: the mean of 10 and 12 is 11, their standard deviation sqrt(2).
    assert rows == [
        ["lif", "", "11.00 ± 1.41", "2", "0.83", "1.5", "2"],
        ["alif", "99.73 ± 0.07", "7.50 ± 0.71", "2", "0.83", "1.5", "2"],
    ]
    table = pd.read_csv(runs / "results.csv")[["fad", "neuron"]]
    assert table.to_numpy().tolist() == [[10, "lif"], [12, "lif"], [7, "alif"], [8, "alif"]]


def test_compare_and_report_leave_files_of_others_alone(runs, tmp_path, sj_taid):
    for command, out, name in (
        ("compare", runs, "results.md"),
        ("compare", runs, "results.csv"),
        ("report", tmp_path / "notes.html", ""),
        ("report", runs / "0" / run.METRICS, ""),
    ):
        path = out / name
        before = path.read_text() if path.exists() else "mine"
        path.write_text(before)
        with pytest.raises(SystemExit, match=f"{path.name} is there, and this command did not"):
            sj_taid(command, str(runs), f"--out={out}")
        assert path.read_text() == before
        if before == "mine":
            path.unlink()
    for _ in range(2):  # its own are replaced
        compare.main([str(runs)])


def test_compare_takes_a_single_run(single, sj_taid, tmp_path):
    sj_taid("compare", str(single.folder), "--out", str(tmp_path / "out"))
    assert cells((tmp_path / "out" / "results.md").read_text())[2][:2] == ["3.50", "2"]


def test_compare_and_report_say_what_cannot_be_written(runs, tmp_path, sj_taid):
    (taken := tmp_path / "taken").write_text("")
    for command in ("compare", "report"):
        with pytest.raises(SystemExit, match="taken"):
            sj_taid(command, str(runs), f"--out={taken}/below")
