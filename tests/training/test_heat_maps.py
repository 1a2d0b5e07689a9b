"""Sweeps over two values: the maps, the cells near the best, the picture, and what is kept."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import image as mpimg
from omegaconf import OmegaConf

from sj_taid.training import compare, gather, results_page, run
from sj_taid.training.heat_maps import Maps
from tests.training.conftest import CONF, metrics

ROOT = CONF.parent
START = ["neuron_start.tau", "neuron_start.v_threshold", "neuron"]
VALUES = {"plif": [0.9, 0.1, 0.2, 0.3], "alif": [0.94, 0.935, 0.925, 0.91]}


@pytest.fixture
def sweep(tmp_path):
    """Two taus by two thresholds, two neurons, two seeds; a cell of PLIF has no run."""
    cells = itertools.product(VALUES, enumerate(itertools.product((2.0, 16.0), (0.3, 1.0))), (0, 1))
    for neuron, (number, (tau, threshold)), seed in cells:
        if (neuron, number) == ("plif", 3):
            continue
        start = {"tau": tau, "v_threshold": threshold, "calibrate": None}
        chosen = [f"neuron_start.{key}={value}" for key, value in start.items() if value]
        command = ["experiment=start_map", f"neuron={neuron}", f"seed={seed}", *chosen]
        choices = {"dataset": "mnist", "neuron": neuron}
        accuracy = VALUES[neuron][number] + 0.02 * seed
        folder = tmp_path / "sweep" / f"{neuron}-{number}-{seed}"
        made = metrics(command, choices, seed, accuracy=accuracy)
        run.Run(folder).save_metrics(made | {"protocol": {"accuracy": "by hand"}})
        config = {
            "seed": seed,
            "model": {"norm": False},
            "task": {"lr_scale": 10},
            "neuron_start": start,
        }
        OmegaConf.save(OmegaConf.create(config), folder / run.CONFIG)
    return tmp_path / "sweep"


def test_a_command_draws_maps_and_counts_good_cells(sweep, capsys):
    compare.main([str(sweep), "--heat-maps", *START, "--difference", "alif", "plif"])
    written, shown = (sweep / "results.md").read_text(), capsys.readouterr().out
    # Seeds differ by 2: ALIF's cells are 95, 94.5, 93.5 and 92, PLIF's 91, 11, 21 and none.
    for row in ("alif | 95.00 | 3 of 4 | 3 of 4", "plif | 91.00 | 0 of 3 | 1 of 3"):
        assert row in " ".join(written.split())
        assert row in " ".join(shown.replace("│", "|").split())
    assert mpimg.imread(sweep / "results.png").std() > 0
    with pytest.raises(SystemExit):
        compare.main([str(sweep), "--difference", "alif", "plif"])
    assert "--difference is of --heat-maps" in capsys.readouterr().err
    others = [
        (["seed", *START[1:]], [], "do not differ in seed"),
        ([*START[:2], "nuron"], [], "do not differ in nuron"),
        (START, ["if"], "no if or plif"),
    ]
    for keys, first, message in others:
        difference = ["--difference", *first, "plif"] if first else []
        with pytest.raises(SystemExit):
            compare.main([str(sweep), "--heat-maps", *keys, *difference])
        assert message in capsys.readouterr().err


def test_a_cell_is_the_mean_over_seeds_and_one_without_a_run_is_empty(sweep):
    runs = [*gather.gather([sweep])[0].values()]
    maps = compare.heat_maps(runs, *START)
    (panels,) = maps.cells.values()
    assert panels["plif"].index.tolist() == ["2.0", "16.0"]  # by size, not as words
    np.testing.assert_allclose(panels["plif"], [[91, 11], [21, np.nan]])
    np.testing.assert_allclose(panels["alif"], [[95, 94.5], [93.5, 92]])


def test_less_is_better_for_errors_and_other_choices_have_maps_of_their_own():
    rows = itertools.product("ab", "xy", "12", "34")
    table = pd.DataFrame(rows, columns=["norm", "neuron", "tau", "threshold"])
    table["fad"] = [10.0, 11, 13, 19] * 2 + [5, 5, 5, 9, 1, 9, 9, 9]
    maps = Maps.of(table, [*table.columns[:4]], "fad", "tau", "threshold", "neuron")
    assert maps.regions().to_numpy().tolist() == [
        ["norm a", "x", "10.00", "2 of 4", "2 of 4"],
        ["norm a", "y", "10.00", "2 of 4", "2 of 4"],
        ["norm b", "x", "5.00", "0 of 4", "3 of 4"],
        ["norm b", "y", "1.00", "1 of 4", "1 of 4"],
    ]


def test_a_study_is_kept_as_rows_which_a_second_time_takes_the_place_of(sweep, tmp_path):
    finished = gather.gather([sweep])[0]
    (path,) = gather.store_studies(dict([*finished.items()][:5]), tmp_path)
    assert path == tmp_path / "results" / "maps" / "start_map.csv"
    for _ in range(2):
        assert [*gather.store_studies(finished, tmp_path)] == [path]
    lines = path.read_text().splitlines()
    assert lines[0] == "# by hand; commit 0123456789ab; torch 2.0; a laptop, 1 threads"
    assert lines[1] == ",".join([*gather.STUDIED, "accuracy"]) and len(lines) == 2 + 14
    assert lines[2] == "mnist,false,null,10,alif,2.0,0.3,0,0.94000"
    table = gather.studied(tmp_path, "start_map")
    maps = results_page.start_maps(table)
    assert [*maps.cells[""]] == ["plif", "alif"]
    assert "| alif | 95.00 |" in " ".join(results_page.start_map(table).split())
    results_page.draw_start_maps(tmp_path)
    assert mpimg.imread(tmp_path / "docs/images/start-map-mnist.png").std() > 0


def test_a_study_keeps_its_own_choices_alone_and_any_neuron(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    results_page.REPORT.write_text("")
    (tmp_path / "results").mkdir()
    for name in ("published.csv", "yardsticks.csv"):
        shutil.copy(Path(CONF).parent / "results" / name, tmp_path / "results")
    folder = next(sweep.glob("alif-0-0"))
    made = json.loads((folder / run.METRICS).read_text())
    mine = made | {"choices": {"dataset": "mnist", "neuron": "mine"}}
    run.Run(folder).save_metrics(mine | {"command": f"{mine['command']} neuron=mine"})
    longer = next(sweep.glob("plif-0-0"))
    made = json.loads((longer / run.METRICS).read_text())
    command = f"{made['command']} trainer.max_epochs=20"
    run.Run(longer).save_metrics(made | {"accuracy": 1.0, "command": command})
    compare.main([str(sweep), "--keep"])
    assert f"not kept: {longer} (no row says its trainer.max_epochs)" in capsys.readouterr().out
    table = gather.studied(tmp_path, "start_map")
    assert len(table) == 13 and table["accuracy"].max() < 1
    assert [*results_page.start_maps(table).cells[""]] == ["plif", "alif", "mine"]


def test_learning_rates_stand_side_by_side_in_order():
    rows = itertools.product(["3", "10"], ["plif", "alif"], ["0", "1"])
    table = pd.DataFrame(rows, columns=["task.lr_scale", "neuron", "seed"]).assign(
        **{"dataset": "mnist", "model.norm": "true", START[0]: "2.0", START[1]: "1.0"},
        accuracy=[0.1, 0.3, 0.5, 0.5, 0.7, 0.7, 0.9, 0.9],
    )
    made = [" ".join(line.split()) for line in results_page.lr_scale(table).splitlines()]
    assert made[0] == "| dataset | norm | neuron | tau | v_threshold | 3 | 10 |"
    assert made[2].endswith("| alif | 2.0 | 1.0 | 50.00 ± 0.00 | 90.00 ± 0.00 |")
    assert made[3].endswith("| plif | 2.0 | 1.0 | 20.00 ± 14.14 | 70.00 ± 0.00 |")
    assert results_page.lr_scale(table[:0]) == "Not run: `lr_scale`.\n"


def test_kept_maps_have_all_columns():
    for path in Path(ROOT, gather.MAPS).glob("*.csv"):
        table = gather.studied(ROOT, path.stem)
        assert path.stem in gather.STUDIES and [*table] == [*gather.STUDIED, "accuracy"]
        assert table["accuracy"].between(0, 1).all()
