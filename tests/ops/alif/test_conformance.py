"""The comparison with the definition: what it names."""

from collections import Counter

import torch

from sj_taid.ops.alif import reference
from tests.ops.alif.conformance import OPTIONS, compare, make_case

ROW = {name: values[0] for name, values in OPTIONS.items()} | {"T": 4, "pack": True}


def test_compare_names_every_difference():
    def wrong(*arguments, **options):
        spikes, v, v_seq, bits = reference.multi_step(*arguments, **options)
        return spikes + 1.0, v + 1e-4, v_seq + torch.nan, bits

    case, launches = make_case(ROW | {"norm": "batch"}), Counter(forward=7)  # of an earlier call
    assert compare(case, reference.multi_step) == []
    found = " ".join(sorted(compare(case, wrong, launches=launches)))
    for expected in ("768 spikes", "the bits are not", "v: error", "v_seq: error nan", "launches"):
        assert expected in found
