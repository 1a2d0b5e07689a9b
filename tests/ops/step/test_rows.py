"""The cache of compiled rows: what runs is the text asked for, out of folders of one's own."""

import multiprocessing
import os
import warnings
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="needs numba: pip install numba")
from numba import config

from sj_taid.ops.step.cpu import rows

SOURCE = """def row(scratch, given, states, out, after, constants, n):
    for i in range(n):
        out[i] = given[i] * f32(3)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder for the cache, of which nothing is known yet."""
    monkeypatch.setattr(config, "CACHE_DIR", str(tmp_path))
    for function in (rows.cache_folder, rows._warn):
        function.cache_clear()
    yield tmp_path
    for function in (rows.cache_folder, rows._warn):
        function.cache_clear()


def run(row):
    from ctypes import POINTER, c_float, cast

    given, out = (c_float * 2)(1, 2), (c_float * 2)()
    pointers = [cast(memory, POINTER(c_float)) for memory in (out, given, out, out, out, out)]
    row.ctypes(*pointers, 2)
    return list(out)


def test_text_is_kept_whole_under_its_hash(home):
    assert run(rows.compile_row(SOURCE)) == [3, 6]
    (path,) = (home / "sj_taid").glob("*.py")
    assert f"row_{path.stem}" in path.read_text() and not [*(home / "sj_taid").glob("*.tmp")]
    assert [*home.rglob("*.nbi")]


@pytest.mark.parametrize("other", [b"raise SystemExit", b"\xff\xfe\x00", b""])
def test_a_file_with_other_content_does_not_run(home, other):
    run(rows.compile_row(SOURCE))
    (path,) = (home / "sj_taid").glob("*.py")
    whole = path.read_bytes()
    path.write_bytes(other)
    assert run(rows.compile_row(SOURCE)) == [3, 6] and path.read_bytes() == whole


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX: bits of who may write")
@pytest.mark.parametrize("which", ["text", "code"])
def test_a_folder_that_others_may_write_to_is_not_used(home, which):
    rows.cache_folder()
    folders = {("text" if path.name == "sj_taid" else "code"): path for path in home.iterdir()}
    folders[which].chmod(0o777)
    rows.cache_folder.cache_clear()
    with pytest.warns(RuntimeWarning, match="others may write to .*NUMBA_CACHE_DIR"):
        assert run(rows.compile_row(SOURCE)) == [3, 6]
    assert not [*home.rglob("*.py")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it is said once
        rows.compile_row(SOURCE)


def test_a_place_that_is_no_folder_is_said_once(home):
    (home / "sj_taid").write_text("")
    with pytest.warns(RuntimeWarning, match="compile again in every process"):
        assert run(rows.compile_row(SOURCE)) == [3, 6]


def _in_a_process(home, barrier, numbers, found):
    config.CACHE_DIR = home
    barrier.wait()
    compiled = [rows.compile_row(SOURCE.replace("(3)", f"({k})")) for k in numbers]
    found.put([(*run(row), bool(row.cache_hits)) for row in compiled])


def _in_processes(home, *numbers):
    """Each compiles these rows: what they give, and whether each row was loaded."""
    context = multiprocessing.get_context("forkserver")
    barrier, found = context.Barrier(len(numbers)), context.Queue()
    about = str(home), barrier
    processes = [context.Process(target=_in_a_process, args=(*about, n, found)) for n in numbers]
    for process in processes:
        process.start()
    results = [found.get(timeout=100) for _ in processes]
    for process in processes:
        process.join()
    return results


@pytest.mark.slow
def test_processes_compile_the_same_and_later_ones_load_it(home):
    for result in _in_processes(home, range(2, 5), range(2, 5)):
        assert [row[:2] for row in result] == [(k, 2 * k) for k in range(2, 5)]
    assert len([*Path(home, "sj_taid").glob("*.py")]) == 3
    # The later process compiles another row first.
    assert _in_processes(home, (6, 2)) == [[(6, 12, False), (2, 4, True)]]
