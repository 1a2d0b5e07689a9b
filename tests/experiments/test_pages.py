"""The committed runs and the tables made of them."""

import itertools
import json
import re

import pages
import pandas as pd
import pytest
import store
from omegaconf import OmegaConf

from sj_taid.training import compare, run
from tests.training.conftest import CONF, metrics

ACCURACIES = {"plif": [0.9, 0.1, 0.2, 0.3], "alif": [0.94, 0.935, 0.925, 0.91]}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Two taus by two thresholds, two neurons, two seeds; a cell of PLIF has no run."""
    folder = tmp_path_factory.mktemp("sweep")
    starts = [*itertools.product((2.0, 16.0), (0.3, 1.0))]
    for neuron, number, seed in itertools.product(ACCURACIES, range(4), (0, 1)):
        if (neuron, number) == ("plif", 3):
            continue
        start = dict(zip(("tau", "v_threshold"), starts[number], strict=True))
        chosen = [f"neuron_start.{key}={value}" for key, value in start.items()]
        command = ["experiment=start_map", f"neuron={neuron}", f"seed={seed}", *chosen]
        choices = {"dataset": "mnist", "neuron": neuron}
        accuracy = ACCURACIES[neuron][number] + 0.02 * seed
        single = run.Run(folder / f"{neuron}-{number}-{seed}")
        single.save_metrics(metrics(command, choices, seed, accuracy=accuracy))
        config = {"seed": seed, "model": {"norm": False}, "task": {"lr_scale": 10}}
        config["neuron_start"] = start | {"calibrate": None}
        OmegaConf.save(OmegaConf.create(config), single.folder / run.CONFIG)
    return compare.gather([folder])


# ---- the store ----


def test_store_names_runs_by_their_choices(runs, tmp_path):
    finished = compare.gather([runs])
    finished[tmp_path / "other"] = metrics(["neuron=lif"], fad=1.0)
    lines = [*store.store(finished, tmp_path)]
    assert lines[-1] == f"not stored: {tmp_path / 'other'} (it is no run of experiment=...)"
    stored = sorted(path.stem for path in (tmp_path / "runs" / "mnist_small_cpu").iterdir())
    assert stored == ["neuron-lif-seed-0", "neuron-lif-seed-1", "seed-0", "seed-1"]
    loaded = store.load_runs("mnist_small_cpu", tmp_path)
    assert [one["fad"] for one in loaded] == [10.0, 12.0, 7.0, 8.0]


def test_store_adds_a_study_as_rows_and_replaces_equal_ones(sweep, tmp_path):
    path = tmp_path / "maps" / "start_map.csv"
    for runs in (dict([*sweep.items()][:5]), sweep, sweep):
        assert [*store.store(runs, tmp_path)] == [f"stored: {path}"]
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join([*store.STUDIED, "accuracy", "commit", "machine"])
    assert lines[1] == "mnist,false,null,10,alif,2.0,0.3,0,0.94000,0123456789ab,a laptop"
    assert len(lines) == 1 + 14
    folder, run = next(iter(sweep.items()))
    longer = run | {"overrides": [*run["overrides"], "trainer.max_epochs=20"]}
    (line,) = store.store({folder: longer}, tmp_path)
    assert line == f"not stored: {folder} (start_map.csv has no trainer.max_epochs)"


# ---- the tables ----


def single(decoder, neuron, seed, error, *more):
    choices = {"decoder": decoder, "neuron": neuron}
    words = ["experiment=mnist_esvae_cpu", *(f"{k}={v}" for k, v in choices.items()), *more]
    return metrics(words, choices, seed, reconstruction=error, fad_published=2 * error, fad=1.0)


def test_changes_are_between_runs_of_one_seed_and_decoder_or_neuron(monkeypatch):
    runs = [
        *(single("fixed", "lif", 0, 2.0), single("taid", "lif", 0, 1.0)),
        *(single("fixed", "lif", 1, 4.0), single("taid", "lif", 1, 5.0)),
        *(single("taid", "alif", 0, 9.0), single("fixed", "plif", 0, 9.0)),
        single("taid", "lif", 1, 9.0, "model.latent_channels=128"),  # of other choices
    ]
    monkeypatch.setattr(pages, "experiments", lambda: ["mnist_esvae_cpu"])
    monkeypatch.setattr(pages, "load_runs", lambda name: runs)
    assert pages.decoders().to_numpy().tolist() == [
        ["`mnist_esvae_cpu`", "`taid`", *["-12.5 ± 53.0"] * 2, "the papers'", "2"]
    ]
    assert pages.generator_neurons().to_numpy().tolist() == [
        ["`mnist_esvae_cpu`", "`lif`", *["+800.0"] * 2, "the papers'", "1"]
    ]


def test_start_map_counts_the_starts_near_the_best(sweep, tmp_path, monkeypatch):
    [*store.store(sweep, tmp_path)]
    study = store.load_study("start_map", tmp_path)
    monkeypatch.setattr(pages, "load_study", lambda name: study)
    # Seeds differ by 2: ALIF's starts are 95, 94.5, 93.5 and 92, PLIF's 91, 11, 21 and none.
    assert pages.start_map().iloc[:, 3:].to_numpy().tolist() == [
        ["plif", "91.00", "0 of 3", "1 of 3"],
        ["alif", "95.00", "3 of 4", "3 of 4"],
    ]


# ---- the committed results ----


def test_pages_draw_and_tabulate_the_stored_benchmarks(tmp_path):
    picture = tmp_path / "frontier.png"
    pages.draw_frontier(picture)
    assert picture.stat().st_size > 10_000
    table = pages.host_layers()
    assert {*table["of plain's"][table["system"] == "plain"]} == {"1.00"}


def test_published_values_have_a_column_and_a_source():
    published = pd.read_csv(store.RESULTS / "published.csv")
    assert set(published["metric"]) <= compare.COLUMNS.keys()
    assert published["source"].notna().all() and (published["value"] > 0).all()


def test_stored_runs_are_of_experiments_and_have_names_for_any_command_line():
    recipes = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    for path in store.RESULTS.glob("runs/*/*.json"):
        assert path.parent.name in recipes
        assert re.fullmatch(r"[A-Za-z0-9._-]{1,120}", path.stem), path
        stored = json.loads(path.read_text())
        assert {"command", "commit", "machine", "evaluations", "choices"} <= stored.keys()
        assert compare.overrides(stored)["experiment"] == path.parent.name
