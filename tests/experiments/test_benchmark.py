"""The neuron's benchmarks, on a grid too small to mean anything."""

import csv
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import esvae
import loading
import pandas as pd
import pytest
import torch
from matplotlib import image as mpimg

from sj_taid.benchmark import common, fsvae, memory, neuron, norm

CPU = torch.device("cpu")
RESULTS = Path(loading.__file__).parent / "results"


@pytest.fixture(scope="module")
def modules():
    return common.contestants(CPU)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_time(tmp_path):
    small = ["--device", "cpu", "--steps", "2", "--neurons", "64", "128", "--repeats", "2"]
    neuron.main([*small, "--only", "ALIF torch", "PLIF", "--out", str(tmp_path)])
    neuron.main([*small, "--only", "SpikingJelly LIF", "--append", "--out", str(tmp_path)])
    table = rows(tmp_path / "neuron.csv")
    assert [(row["neuron"], row["N"]) for row in table] == [
        ("ALIF torch", "64"),
        ("SpikingJelly PLIF", "64"),
        ("ALIF torch", "128"),
        ("SpikingJelly PLIF", "128"),
        ("SpikingJelly LIF", "64"),
        ("SpikingJelly LIF", "128"),
    ]
    for row in table:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert row["device"] and row["commit"] and row["torch_version"]
    assert (tmp_path / "neuron.png").stat().st_size > 0


def test_nothing_is_timed_unless_all_compute_the_same(modules):
    neuron.gate(modules, CPU)
    broken = dict(modules)
    broken["ALIF broken"] = torch.nn.Threshold(0.5, 0.0)
    with pytest.raises(SystemExit, match="ALIF broken differs"):
        neuron.gate(broken, CPU)


def test_what_is_left_out_cannot_stop_the_others(tmp_path, monkeypatch):
    made = common.contestants(CPU) | {"SpikingJelly FlexSN": Fails()}
    monkeypatch.setattr(neuron, "contestants", lambda device: made)
    small = ["--device", "cpu", "--steps", "2", "--neurons", "64", "--repeats", "1"]
    neuron.main([*small, "--only", "PLIF", "--out", str(tmp_path)])
    assert [row["neuron"] for row in rows(tmp_path / "neuron.csv")] == ["SpikingJelly PLIF"]


class Fails(torch.nn.Module):
    def forward(self, x_seq):
        raise RuntimeError("no such kernel")


def test_ours_are_never_skipped_and_what_is_asked_for_is_there(tmp_path, capsys):
    case = ("float32", 2, 8, CPU, 1)
    assert neuron.time_neurons({"SpikingJelly LIF": Fails()}, *case) == []
    assert (
        "skipped SpikingJelly LIF at float32, T=2, N=8: no such kernel" in capsys.readouterr().out
    )
    with pytest.raises(RuntimeError, match="no such kernel"):
        neuron.time_neurons({"ALIF torch": Fails()}, *case)
    with pytest.raises(SystemExit, match=r"--only cupi: expected parts of ALIF torch, .*LIF"):
        neuron.main(["--device", "cpu", "--only", "torch", "cupi", "--out", str(tmp_path)])


def test_a_step_of_fsvae(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fsvae, "FSVAE", partial(fsvae.FSVAE, hidden_channels=[4], latent_channels=6)
    )
    size = ["--T", "3", "--batch", "2", "--channels", "1", "--size", "8", "--repeats", "1"]
    fsvae.main(["--device", "cpu", *size, "--parts", "compare", "--out", str(tmp_path)])
    table = rows(tmp_path / "fsvae.csv")
    works = ("training step", "sampling")
    assert [(row["work"], row["model"]) for row in table] == [
        (work, model) for work in works for model in fsvae.MODELS
    ]
    assert all(row["ratio"] == "1" for row in table if row["model"] == fsvae.RIVAL)
    assert all(row["device"] and row["commit"] and float(row["median_ms"]) > 0 for row in table)


def test_a_step_of_esvae(tmp_path):
    tiny = ["model.hidden_channels=[4]", "model.T=2", "model.latent_channels=4"]
    options = ["--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]
    esvae.main(options, [*tiny, "dataset.image_size=8"])
    table = pd.read_csv(tmp_path / "esvae.csv").set_index("work")
    assert [*table.index] == [*esvae.VARIANTS, *fsvae.KINDS, "other", "loading"]
    assert table.loc[esvae.RECIPE, "ratio"] == 1 and (table["median_ms"] >= 0).all()
    assert (tmp_path / "esvae.png").is_file()
    with pytest.raises(SystemExit):
        esvae.main(["--device", "cuda"])


def test_the_breakdown_is_made_for_a_cpu(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        fsvae.main(["--device", "cuda", "--parts", "compare", "breakdown"])
    assert "breakdown is made for a CPU; leave it out on a GPU" in capsys.readouterr().err
    others = {"compare": lambda options: [{"work": "compared"}], "breakdown": fsvae.breakdown}
    monkeypatch.setattr(fsvae, "PARTS", others)
    monkeypatch.setattr(fsvae, "draw", lambda *_: pytest.fail("there is no breakdown to draw"))
    fsvae.main(["--device", "cuda", "--out", str(tmp_path)])  # all but that
    assert [row["work"] for row in rows(tmp_path / "fsvae.csv")] == ["compared"]


def test_memory(tmp_path, modules):
    memory.main(["--device", "cpu", "--steps", "4", "24", "--out", str(tmp_path)])
    saved = {
        (row["neuron"], row["dtype"], row["T"]): float(row["bytes_per_neuron_and_step"])
        for row in rows(tmp_path / "memory.csv")
    }
    assert saved["ALIF cupy (counted)", "float32", "4"] == 4
    assert saved["ALIF cupy (counted)", "bfloat16", "4"] == 2
    assert saved["ALIF cupy (counted)", "float32", "24"] == pytest.approx(4 + 2 * 4 / 24, abs=1e-3)
    assert saved["SpikingJelly PLIF", "float32", "4"] > 4


def test_loading(tmp_path, monkeypatch):
    net = loading.plif([[4], [4]], batch=2)
    events = partial(loading.Recordings, events=50)
    cases = {
        "memory": loading.Case(loading.Memory, 8, 1, 32, "affine", loading.FSVAE_STEP | net),
        "photographs": loading.Case(loading.Photographs, 8, 3, 32, "flip", {}),
        "recordings": loading.Case(events, 8, 2, 8, "affine", net),
    }
    monkeypatch.setattr(loading, "CASES", cases)
    loading.main(["--device", "cpu", "--batch", "4", "--repeats", "2", "--out", str(tmp_path)])
    table = rows(tmp_path / "loading.csv")
    loaders = [row for row in table if row["work"] == "loader"]
    assert {(row["data"], row["augment"], row["processes"]) for row in loaders} == {
        (name, augment, processes)
        for name, case in cases.items()
        for augment in ("", case.augment)
        for processes in ("0", "2")
    }
    steps = [row for row in table if row["work"] == "training step"]
    assert [(row["data"], row["net"]) for row in steps] == [
        ("memory", "FSVAE"),
        ("memory", "PLIF-net"),
        ("recordings", "PLIF-net"),
    ]
    for row in table:
        low, median, high = (float(row[f"{q}samples_per_second"]) for q in ("p20_", "", "p80_"))
        assert 0 < low <= median <= high
        assert row["cores"] and row["commit"]
    assert (tmp_path / "loading.png").stat().st_size > 0


def test_norms(tmp_path):
    small = ["--device", "cpu", "--steps", "3", "--dtypes", "float32", "--batch", "2"]
    norm.main([*small, "--nets", norm.LAYERS, "--repeats", "1", "--out", str(tmp_path)])
    kept = {row["variant"]: float(row["kept_ratio"]) for row in rows(tmp_path / "norm.csv")}
    ours = ("ALIF, two operators", "ALIF, one operator", "ALIF, one operator, bits")
    assert kept[norm.RIVAL] == 1.0 > kept[ours[0]] > kept[ours[1]] > kept[ours[2]] > 0
    assert (tmp_path / "norm.png").stat().st_size > 0


@pytest.mark.parametrize(
    "script", [fsvae, loading, neuron, norm], ids=lambda script: Path(script.__file__).stem
)
def test_the_committed_rows_can_be_drawn(tmp_path, script):
    paths = list(RESULTS.glob(f"*/{Path(script.__file__).stem}.csv"))
    for path in paths:
        script.draw(pd.read_csv(path), tmp_path / "drawn.png")
        assert mpimg.imread(tmp_path / "drawn.png").std() > 0
    assert paths


@pytest.mark.parametrize("name", ["fsvae", "memory", "neuron", "norm"])
def test_the_command_of_a_module_is_one_that_can_be_repeated(name, monkeypatch):
    main = SimpleNamespace(__spec__=find_spec(f"sj_taid.benchmark.{name}"))
    monkeypatch.setitem(sys.modules, "__main__", main)
    for place in ([], ["--out", "/a/place"], ["--out=/a/place"], ["--ou", "/a/place"]):
        words = [
            f"/anywhere/sj_taid/benchmark/{name}.py",
            "--T",
            "4",
            *place,
            "--only",
            "ALIF torch",
        ]
        monkeypatch.setattr(sys, "argv", words)
        said = f"python -m sj_taid.benchmark.{name} --T 4 --only 'ALIF torch'"
        assert common.command() == said


def test_no_committed_command_says_where_it_wrote():
    paths = list(RESULTS.glob("*/*.csv"))
    commands = {row["command"] for path in paths for row in rows(path)}
    assert len(commands) >= len(paths)
    assert not [command for command in commands if "--out" in command]


def test_results_are_not_written_among_the_committed_ones():
    assert common.parser("").parse_args([]).out == Path("benchmark-results")


def test_every_machine_with_results_is_named():
    named = re.findall(r"^\| `(.+?)`", (RESULTS / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(path.name for path in RESULTS.iterdir() if path.is_dir())
