"""The cases in which backends are compared with the definition, and their command."""

import csv
from collections import Counter

import pytest
import torch

from sj_taid.ops.alif import reference
from tests.ops.alif import conformance
from tests.ops.alif.conformance import COMPACT, OPTIONS, compare, make_case, pairwise

ROW = {name: values[0] for name, values in OPTIONS.items()} | {"T": 4}


def shifted(name, amount):
    """The definition with one output shifted by ``amount``."""

    def multi_step(*arguments, **options):
        outputs = [*reference.multi_step(*arguments, **options)]
        at = ("spike_seq", "v", "v_seq").index(name)
        outputs[at] = outputs[at] + amount
        return tuple(outputs)

    return multi_step


def test_pairwise_holds_every_pair_in_few_cases():
    rows = [*pairwise(COMPACT)]
    assert len(rows) <= 60
    pairs = {(a, b, row[a], row[b]) for row in rows for a in COMPACT for b in COMPACT}
    for a, b in (("surrogate", "dtype"), ("norm", "frozen"), ("pack", "T"), ("norm", "v_reset")):
        assert {(a, b, x, y) for x in COMPACT[a] for y in COMPACT[b]} <= pairs


@pytest.mark.parametrize("norm", [None, "batch", "fixed"])
def test_compare_finds_the_definition_equal_to_itself(norm):
    assert compare(make_case(ROW | {"norm": norm, "pack": True}), reference.multi_step) == []


@pytest.mark.parametrize(
    ("name", "amount", "found"),
    [("spike_seq", 1.0, "768 spikes"), ("v", 1e-4, "v: error"), ("v_seq", torch.nan, "v_seq: er")],
)
def test_compare_names_a_difference(name, amount, found):
    (difference,) = compare(make_case(ROW), shifted(name, amount))
    assert difference.startswith(found)


def test_compare_names_wrong_bits_and_missing_launches():
    def multi_step(*arguments, **options):
        *outputs, bits = reference.multi_step(*arguments, **options)
        return *outputs, bits ^ 1

    launches = Counter(forward=7)  # of an earlier call
    case = make_case(ROW | {"pack": True, "norm": "batch"})
    expected = {"statistics": 1, "forward": 1, "backward": 2}
    assert compare(case, multi_step, launches=launches) == [
        "the bits are not the spikes'",
        f"launches {{}}, expected {expected}",
    ]


def rows_of(path):
    return [*csv.DictReader(path.open(newline=""))]


def test_command_writes_a_row_per_case(tmp_path, capsys):
    pytest.importorskip("numba", reason="needs numba: pip install numba")
    options = ["--device", "cpu", "--dtypes", "bfloat16", "--cases", "1", "--out", str(tmp_path)]
    assert conformance.main(options) == 0
    (row,) = rows_of(tmp_path / "conformance-bfloat16.csv")
    assert row["outcome"] == "equal" and row["difference"] == "" and "bfloat16" in row["case"]
    assert conformance.main(["--device", "cpu", "--tiny"]) == 0
    assert "numba: equal to the definition, bit for bit" in capsys.readouterr().out


def test_command_fails_for_a_single_wrong_bit(monkeypatch, capsys):
    pytest.importorskip("numba", reason="needs numba: pip install numba")

    def multi_step(*arguments, backend, **options):
        spike_seq, v, v_seq = reference.multi_step(*arguments, **options)
        v[0] = torch.nextafter(v[0], torch.tensor(9.0))
        return spike_seq, v, v_seq

    monkeypatch.setattr(conformance, "alif_multi_step", multi_step)
    assert conformance.main(["--device", "cpu", "--tiny"]) == 1
    assert "v: 1 of 64 values differ" in capsys.readouterr().out


@pytest.mark.parametrize("usable", [True, False])
def test_write_continues_after_an_error_unless_the_gpu_is_broken(
    tmp_path, monkeypatch, capsys, usable
):
    def run(case):
        if case == "second":
            raise RuntimeError("an illegal memory access")
        return []

    monkeypatch.setattr(conformance, "_is_usable", lambda: usable)
    failed = conformance.write(("first", "second", "third"), run, tmp_path / "rows.csv")
    outcomes = {row["case"]: row["outcome"] for row in rows_of(tmp_path / "rows.csv")}
    last = "equal" if usable else "not run"
    assert outcomes == {"first": "equal", "second": "failed", "third": last}
    assert failed == (1 if usable else 2)
    output = capsys.readouterr()
    assert "second: failed RuntimeError: an illegal memory access" in output.out
    assert "Traceback" in output.err
