"""The benchmarks, on grids too small to mean anything, and their committed results."""

import csv
import re
import sys
from functools import partial
from pathlib import Path

import common
import esvae
import fsvae
import loading
import memory
import neuron
import norm
import pandas as pd
import pytest
import torch

CPU = torch.device("cpu")
RESULTS = Path(loading.__file__).parent / "results"


@pytest.fixture(scope="module")
def modules():
    return common.neurons(CPU)


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_neuron_times_and_appends(tmp_path):
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


def test_neuron_check_refuses_other_results(modules):
    neuron.check(modules, CPU)
    broken = dict(modules)
    broken["ALIF broken"] = torch.nn.Threshold(0.5, 0.0)
    with pytest.raises(SystemExit, match="ALIF broken gives other spikes"):
        neuron.check(broken, CPU)


def test_neuron_only_leaves_the_others_out_of_the_check(modules, tmp_path, monkeypatch):
    broken = modules | {"SpikingJelly FlexSN": Fails()}
    monkeypatch.setattr(neuron, "neurons", lambda device: broken)
    small = ["--device", "cpu", "--steps", "2", "--neurons", "64", "--repeats", "1"]
    neuron.main([*small, "--only", "PLIF", "--out", str(tmp_path)])
    assert [row["neuron"] for row in rows(tmp_path / "neuron.csv")] == ["SpikingJelly PLIF"]


class Fails(torch.nn.Module):
    def forward(self, x_seq):
        raise RuntimeError("no such kernel")


def test_neuron_skips_a_rival_that_fails_but_never_ours(tmp_path, capsys):
    case = ("float32", 2, 8, CPU, 1)
    assert neuron.time_neurons({"SpikingJelly LIF": Fails()}, *case) == []
    assert (
        "skipped SpikingJelly LIF at float32, T=2, N=8: no such kernel" in capsys.readouterr().out
    )
    with pytest.raises(RuntimeError, match="no such kernel"):
        neuron.time_neurons({"ALIF torch": Fails()}, *case)
    with pytest.raises(SystemExit, match=r"--only cupi: expected parts of ALIF torch, .*LIF"):
        neuron.main(["--device", "cpu", "--only", "torch", "cupi", "--out", str(tmp_path)])


def test_fsvae_times_every_model(tmp_path, monkeypatch):
    monkeypatch.setattr(
        fsvae, "FSVAE", partial(fsvae.FSVAE, hidden_channels=[4], latent_channels=6)
    )
    size = ["--T", "3", "--batch", "2", "--channels", "1", "--size", "8", "--repeats", "1"]
    fsvae.main(["--device", "cpu", *size, "--out", str(tmp_path)])
    table = rows(tmp_path / "fsvae.csv")
    works = ("training step", "sampling")
    assert [(row["work"], row["model"]) for row in table] == [
        (work, model) for work in works for model in fsvae.MODELS
    ]
    assert all(row["ratio"] == "1" for row in table if row["model"] == fsvae.RIVAL)
    assert all(row["device"] and row["commit"] and float(row["median_ms"]) > 0 for row in table)


def test_esvae_times_every_variant_and_profiles(tmp_path):
    tiny = ["model.hidden_channels=[4]", "model.T=2", "model.latent_channels=4"]
    options = ["--device", "cpu", "--repeats", "1", "--out", str(tmp_path)]
    esvae.main(options, [*tiny, "dataset.image_size=8"])
    table = pd.read_csv(tmp_path / "esvae.csv").set_index("work")
    assert [*table.index] == [*esvae.VARIANTS, *esvae.KINDS, "other"]
    assert table.loc[esvae.RECIPE, "ratio"] == 1 and (table["median_ms"] >= 0).all()


def test_memory_counts_saved_bytes(tmp_path):
    memory.main(["--device", "cpu", "--steps", "4", "24", "--out", str(tmp_path)])
    saved = {
        (row["neuron"], row["dtype"], row["T"]): float(row["bytes_per_neuron_and_step"])
        for row in rows(tmp_path / "memory.csv")
    }
    assert saved["ALIF cupy (computed)", "float32", "4"] == 4
    assert saved["ALIF cupy (computed)", "bfloat16", "4"] == 2
    assert saved["ALIF cupy (computed)", "float32", "24"] == pytest.approx(4 + 2 * 4 / 24, abs=1e-3)
    assert saved["SpikingJelly PLIF", "float32", "4"] > 4


def test_loading_times_every_case(tmp_path, monkeypatch):
    plif_net = partial(loading.plif_net, stages=2)
    events = partial(loading.Recordings, events=50)
    cases = {
        "memory": loading.Case(loading.Memory, 8, 1, 32, "affine", "FSVAE", loading.fsvae, 2),
        "photographs": loading.Case(
            loading.Photographs, 8, 3, 32, "flip", "FSVAE", loading.fsvae, 2
        ),
        "recordings": loading.Case(events, 8, 2, 8, "affine", "PLIF-net", plif_net, 2),
    }
    monkeypatch.setattr(loading, "CASES", cases)
    loading.main(["--device", "cpu", "--batch", "4", "--repeats", "2", "--out", str(tmp_path)])
    table = rows(tmp_path / "loading.csv")
    loaders = [row for row in table if row["work"] == "loader"]
    assert [(row["data"], row["augment"], float(row["processes"])) for row in loaders] == [
        (name, case.augment, processes) for name, case in cases.items() for processes in (0, 2)
    ]
    steps = [row for row in table if row["work"] == "training step"]
    assert [(row["data"], row["net"]) for row in steps] == [
        (name, case.net) for name, case in cases.items()
    ]
    for row in table:
        low, median, high = (float(row[f"{q}samples_per_second"]) for q in ("p20_", "", "p80_"))
        assert 0 < low <= median <= high
        assert row["cores"] and row["commit"]


def test_norm_counts_saved_bytes(tmp_path):
    small = ["--device", "cpu", "--steps", "3", "--dtypes", "float32", "--batch", "2"]
    norm.main([*small, "--nets", norm.LAYERS, "--repeats", "1", "--out", str(tmp_path)])
    saved = {row["variant"]: float(row["saved_ratio"]) for row in rows(tmp_path / "norm.csv")}
    ours = ("ALIF, two operators", "ALIF, one operator", "ALIF, one operator, bits")
    assert saved[norm.RIVAL] == 1.0 > saved[ours[0]] > saved[ours[1]] > saved[ours[2]] > 0


@pytest.mark.parametrize(
    "out", [[], ["--out", "/a/place"], ["--out=/a/place"], ["--ou", "/a/place"]]
)
def test_command_can_be_repeated_and_does_not_say_where_it_wrote(monkeypatch, out):
    arguments = [neuron.__file__, "--T", "4", *out, "--only", "ALIF torch"]
    monkeypatch.setattr(sys, "argv", arguments)
    said = "python experiments/benchmark/neuron.py --T 4 --only 'ALIF torch'"
    assert common.command() == said


def test_parser_writes_beside_the_committed_results():
    assert common.parser("").parse_args([]).out == Path("benchmark-results")


# ---- the committed results ----

FACTS = ["command", "commit", "threads", "machine", "torch_version", "spikingjelly_version"]
TIMES = ["median_ms", "p20_ms", "p80_ms"]
#: the columns of each CSV beyond FACTS that must have a value in every row
SCHEMAS = {
    "compile": [*TIMES, "net", "mode", "shape", "backend"],
    "esvae": ["work", "batch", "median_ms", "ms_per_image"],
    "fsvae": ["work", "model", "median_ms"],
    "memory": ["neuron", "dtype", "T", memory.COLUMN],
    "loading": ["data", "work", "samples", "samples_per_second", "device", "batch", "cores"],
    "neuron": [*TIMES, "neuron", "dtype", "T", "N", "first_call_ms", "share_of_floor", "device"],
    "norm": ["net", "variant", "dtype", "T", "step", "saved_mb", "saved_ratio", "device"],
}


@pytest.mark.parametrize(
    "path", [*RESULTS.glob("*/*.csv")], ids=lambda p: f"{p.parent.name}/{p.stem}"
)
def test_committed_csv_has_its_columns(path):
    table = pd.read_csv(path)
    columns = [*FACTS, *SCHEMAS[path.stem.partition("-")[0]]]
    assert {*columns} <= {*table.columns} and table[columns].notna().all(axis=None)
    numbers = table.select_dtypes("number")
    assert (numbers.fillna(0) >= 0).all(axis=None)
    assert (table["commit"].str.fullmatch("[0-9a-f]{12}")).all()
    assert not table["command"].str.contains("--out").any()
    if {*TIMES} <= {*table.columns}:
        timed = table.dropna(subset=TIMES)
        assert (timed["p20_ms"] <= timed["median_ms"]).all()
        assert (timed["median_ms"] <= timed["p80_ms"]).all()


def test_every_machine_with_results_is_named():
    named = re.findall(r"^\| `(.+?)`", (RESULTS / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(path.name for path in RESULTS.iterdir() if path.is_dir())
