"""Gathering runs, their tables, and the command that compares them."""

import pandas as pd
import pytest

from sj_taid.training import compare, run
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
    assert len(compare.gather([runs, runs / ".." / runs.name, tmp_path / "link"])) == 4


def test_gather_names_folders_without_a_finished_run(single, tmp_path):
    (single.folder / run.METRICS).unlink()
    with pytest.raises(FileNotFoundError, match=f"no finished run below {single.folder}; an"):
        compare.gather([single.folder])
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent"):
        compare.gather([single.folder, tmp_path / "absent"])


def test_latest_metrics_are_those_of_the_last_evaluation_of_each_checkpoint(single):
    best, other = (run.Run(single.folder, single.best.with_stem(n)) for n in ("best", "epoch=0"))
    for of, name in ((single, "fad"), (best, "accuracy"), (other, "fad")):
        for value in (0.9, 0.5):
            of.save_evaluation({"metrics": {name: value}, "protocol": {name: f"by {value}"}})
    read = single.latest_metrics
    assert (read["fad"], read["accuracy"], read["protocol"]["fad"]) == (0.5, 0.5, "by 0.5")
    single.begin("seed: 0", single.metrics)  # it trains longer
    assert not single.evaluations and not single.is_finished


# ---- tables ----


def test_summary_keeps_protocols_apart(runs):
    first, *others = compare.gather([runs]).values()
    assert "FAD, own autoencoder ↓" in compare.summary([first, *others])
    first["protocol"] = {"fad": "by eye"}
    mixed = compare.summary([first, *others])
    title = "FAD, own autoencoder ↓ (of different protocols)"
    assert {*mixed[title]} == {"7.50 ± 0.71", "10.00, 12.00"}


@pytest.mark.parametrize(
    ("losses", "text"),
    [
        ([2e-5, 4e-5], "3.0e-05 ± 1.4e-05"),
        ([6e-5], "0.0001"),
        ([0.0], "0.0000"),
    ],
)
def test_a_small_loss_is_not_printed_as_zero(losses, text):
    many = [metrics([], seed=seed, loss=loss) for seed, loss in enumerate(losses)]
    assert [*compare.summary(many)["loss, last epoch ↓"]] == [text]


def test_summary_takes_a_choice_over_a_metric_of_its_name_and_over_a_folder():
    names = ["image_folder_cats", "image_folder_dogs"]
    two = [
        metrics(["dataset=image_folder", f"+loss={loss}"], {"dataset": name}) | {"loss": 0.5}
        for loss, name in zip(("mse", "tet"), names, strict=True)
    ]
    table = compare.summary(two)[["dataset", "loss", "loss, last epoch ↓"]]
    assert table.to_numpy().tolist() == [[names[0], "mse", "0.5000"], [names[1], "tet", "0.5000"]]


def test_column_text_spreads_counts_that_differ():
    epochs = compare.COLUMNS["epochs"]
    assert [epochs.text(pd.Series(pair)) for pair in ([12, 20], [20, 20])] == ["16 ± 6", "20"]


# ---- the command ----


def test_compare_shows_mean_and_spread_over_seeds(runs, capsys, tmp_path):
    out = tmp_path / "out"
    compare.main([str(runs), f"--out={out}"])
    shown = capsys.readouterr().out
    assert "cannot be read (Expecting" in shown and "unfinished: finish the run first" in shown
    written = (out / "results.md").read_text()
    assert written in shown
    head, _, *rows = cells(written)
    assert head[:3] == ["neuron", "accuracy, last epoch, % ↑", "FAD, own autoencoder ↓"]
    assert head[3:] == ["epochs", "parameters, M", "training, min", "runs", "commit"]
    # By hand: the mean of 10 and 12 is 11, their standard deviation sqrt(2).
    assert rows == [
        ["lif", "", "11.00 ± 1.41", "2", "0.83", "1.5", "2", "0123456789ab"],
        ["alif", "99.73 ± 0.07", "7.50 ± 0.71", "2", "0.83", "1.5", "2", "0123456789ab"],
    ]
    table = pd.read_csv(out / "results.csv")
    assert not table.isna().all().any() and "fad protocol" in table
    table = table[["fad", "neuron"]]
    assert table.to_numpy().tolist() == [[10, "lif"], [12, "lif"], [7, "alif"], [8, "alif"]]


def test_tables_are_of_one_task_and_data_set_each():
    choices = [{"task": "generation", "dataset": name} for name in ("digits", "mnist", "digits")]
    written = compare.tables([metrics([], choice, fad=3.5) for choice in choices])
    heads = [line for line in written.splitlines() if line.startswith("##")]
    assert heads == ["## generation, digits", "## generation, mnist"]
    assert "##" not in compare.tables([metrics([], choices[0], fad=3.5)])


def test_compare_leaves_files_of_others_alone(runs, sj_taid):
    for name in ("results.md", "results.csv"):
        path = runs / name
        for make in (path.mkdir, lambda path=path: path.write_text("mine")):
            make()
            with pytest.raises(SystemExit, match=f"{name} is there, and this command did not"):
                sj_taid("compare", str(runs), f"--out={runs}")
            path.rmdir() if path.is_dir() else path.unlink()
    for _ in range(2):  # its own are replaced
        compare.main([str(runs)])
