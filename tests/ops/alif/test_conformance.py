"""The cases that backends are held against the definition with, and their command."""

import csv
from collections import Counter

import pytest
import torch

from sj_taid.ops.alif import reference
from tests.ops.alif import conformance
from tests.ops.alif.conformance import COMPACT, OPTIONS, Conformance, pairwise

ROW = {name: values[0] for name, values in OPTIONS.items()} | {"T": 4}


def off_by(name, amount):
    """The definition with one output moved by ``amount``."""
    place = ("spike_seq", "v", "v_seq").index(name)

    def multi_step(*arguments, **options):
        outputs = [*reference.multi_step(*arguments, **options)]
        outputs[place] = outputs[place] + amount
        return tuple(outputs)

    return multi_step


def test_a_compact_set_holds_every_pair_in_few_cases():
    rows = [*pairwise(COMPACT)]
    assert len(rows) <= 60
    pairs = {(a, b, row[a], row[b]) for row in rows for a in COMPACT for b in COMPACT}
    for a, b in (("surrogate", "dtype"), ("norm", "frozen"), ("pack", "T"), ("norm", "v_reset")):
        assert {(a, b, x, y) for x in COMPACT[a] for y in COMPACT[b]} <= pairs


@pytest.mark.parametrize("norm", [None, "batch", "fixed"])
def test_the_definition_equals_itself(norm):
    assert Conformance(ROW | {"norm": norm}).differences(reference.multi_step) == []


@pytest.mark.parametrize(
    ("name", "amount", "found"),
    [("spike_seq", 1.0, "768 spikes"), ("v", 1e-4, "v: error"), ("v_seq", torch.nan, "v_seq: er")],
)
def test_a_difference_is_named(name, amount, found):
    (difference,) = Conformance(ROW).differences(off_by(name, amount))
    assert difference.startswith(found)


def test_wrong_bits_and_launches_that_nobody_made_are_differences():
    def without_a_bit(*arguments, return_bits, **options):
        *outputs, bits = reference.multi_step(*arguments, return_bits=True, **options)
        return (*outputs, bits & 1) if return_bits else outputs

    launches = Counter(forward=7)  # of an earlier call
    found = Conformance(ROW | {"pack": True, "norm": "batch"}).differences(
        without_a_bit, launches=launches
    )
    expected = {"statistics": 1, "forward": 1, "backward": 2}
    assert found == ["the bits are not the spikes'", f"launches {{}}, expected {expected}"]


def rows_of(path):
    return [*csv.DictReader(path.open(newline=""))]


def test_the_command(tmp_path, capsys):
    pytest.importorskip("numba", reason="needs numba: pip install numba")
    options = ["--device", "cpu", "--dtypes", "bfloat16", "--cases", "1", "--out", str(tmp_path)]
    assert conformance.main(options) == 0
    (row,) = rows_of(tmp_path / "conformance-bfloat16.csv")
    assert row["outcome"] == "equal" and row["difference"] == "" and "bfloat16" in row["case"]
    assert conformance.main(["--device", "cpu", "--tiny"]) == 0
    assert "numba: equal to the definition, bit for bit" in capsys.readouterr().out


def test_a_single_wrong_bit_fails(monkeypatch, capsys):
    pytest.importorskip("numba", reason="needs numba: pip install numba")

    def by_one_bit(*arguments, backend, **options):
        spike_seq, v, v_seq = reference.multi_step(*arguments, **options)
        v[0] = torch.nextafter(v[0], torch.tensor(9.0))
        return spike_seq, v, v_seq

    monkeypatch.setattr(conformance, "alif_multi_step", by_one_bit)
    assert conformance.main(["--device", "cpu", "--tiny"]) == 1
    assert "v: 1 of 64 values differ" in capsys.readouterr().out


@pytest.mark.parametrize("usable", [True, False])
def test_goes_on_past_a_case_that_raises(tmp_path, monkeypatch, capsys, usable):
    """Unless the GPU refuses whatever the process asks: then the rest is named, not blamed."""

    def run(case):
        if case == "second":
            raise RuntimeError("an illegal memory access")
        return []

    monkeypatch.setattr(conformance, "_usable", lambda: usable)
    cases = ("first", "second", "third")
    failed = conformance.write(cases, run, tmp_path / "rows.csv")
    outcomes = {row["case"]: row["outcome"] for row in rows_of(tmp_path / "rows.csv")}
    last = "equal" if usable else "not run"
    assert outcomes == {"first": "equal", "second": "failed", "third": last}
    assert failed == (1 if usable else 2)
    output = capsys.readouterr()
    assert "second: failed RuntimeError: an illegal memory access" in output.out
    assert "Traceback" in output.err
