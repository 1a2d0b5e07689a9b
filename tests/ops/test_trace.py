"""``SJ_TAID_TRACE``: a line of JSON for each call, and nothing without it."""

import json
from functools import partial

import pytest
import torch

from sj_taid.ops.alif import reference
from sj_taid.ops.trace import trace_calls
from tests.helpers import Case, assert_equal, results, tensors

CASE = Case(None, channels=5, dtype=torch.float16, norm="batch", frozen=("w",), pack=True)


def run(engine, *call, **options):
    assert engine == "engine"
    return reference.multi_step(*call, **options)


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """The traced function, and its file."""
    path = tmp_path / "calls.jsonl"
    monkeypatch.setenv("SJ_TAID_TRACE", str(path))
    return partial(trace_calls(run), "engine"), path


def test_trace_calls_is_off_by_default(monkeypatch):
    for value in (None, ""):
        if value is None:
            monkeypatch.delenv("SJ_TAID_TRACE", raising=False)
        else:
            monkeypatch.setenv("SJ_TAID_TRACE", value)
        assert trace_calls(run) is run


def test_trace_calls_writes_what_a_call_takes_time_for(trace):
    traced, path = trace
    assert_equal(results(traced, CASE), results(partial(run, "engine"), CASE))
    x_seq, w, v_threshold = (tensors(CASE)[name] for name in ("x", "w", "v_threshold"))
    with torch.no_grad():
        traced(x_seq.mT, 0.5, w[0], v_threshold[0], **CASE.options(), store_v_seq=False)
    with_norm, plain = map(json.loads, path.read_text().splitlines())
    surrogate = {"surrogate": "ATan", "surrogate_options": {"alpha": 2.0}}
    reset = {"decay_input": True, "v_reset": None, "detach_reset": False}
    shared = {"dtype": "float16", "device": "cpu", **surrogate, **reset}
    assert with_norm == {
        **shared,
        "shape": [6, 3, 5],
        "stride": [15, 5, 1],
        "grad": ["x_seq", "v", "v_threshold", "weight", "bias"],
        "v_tensor": True,
        "per_channel": True,
        "norm": "batch",
        "store_v_seq": True,
        "return_bits": True,
    }
    assert plain == {
        **shared,
        "shape": [6, 5, 3],
        "stride": [15, 1, 5],
        "grad": [],
        "v_tensor": False,
        "per_channel": False,
        "norm": None,
        "store_v_seq": False,
        "return_bits": False,
    }


def test_trace_calls_warns_under_torch_compile(trace):
    traced, path = trace
    x_seq, w, v_threshold = (tensors(Case())[name] for name in ("x", "w", "v_threshold"))
    options = Case().options()

    def fire(x_seq):
        return traced(x_seq, 0.0, w, v_threshold, **options, store_v_seq=False)[0]

    with pytest.warns(RuntimeWarning, match="calls under torch.compile are not written"):
        compiled = torch.compile(fire, fullgraph=True, backend="eager")(x_seq)
    assert torch.equal(compiled, fire(x_seq)) and len(path.read_text().splitlines()) == 1


def test_trace_calls_names_the_variable_where_it_cannot_write(tmp_path, monkeypatch):
    monkeypatch.setenv("SJ_TAID_TRACE", str(tmp_path / "no" / "calls.jsonl"))
    with pytest.raises(FileNotFoundError) as info:
        results(partial(trace_calls(run), "engine"), Case())
    assert info.value.__notes__ == [
        "SJ_TAID_TRACE names this file: make its folder, or name another file"
    ]
