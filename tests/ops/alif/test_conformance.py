"""The cases in which backends are compared with the definition."""

from collections import Counter

import pytest
import torch

from sj_taid.ops.alif import reference
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
