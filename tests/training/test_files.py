"""What cannot be written is told from what else may go wrong."""

import errno
import pickle
from pathlib import Path

import pytest

from sj_taid.training.files import Unwritable, atomic_write, report_unwritable, unwritable


def test_unwritable_pickles(tmp_path):
    error = unwritable(tmp_path, OSError("no space"))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is Unwritable and str(again) == str(error)
    assert str(error).startswith(f"{tmp_path} cannot be written (no space); ")


def test_atomic_write_reports_a_full_disk_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(path):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(Unwritable, match="what was there before is whole"), atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(Unwritable, match="cannot be written"), atomic_write(path):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")
    with pytest.raises(RuntimeError, match="bug"), atomic_write(path):
        raise RuntimeError("bug")
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


def test_report_unwritable_finds_a_full_or_read_only_disk_behind_any_error(tmp_path, monkeypatch):
    with pytest.raises(KeyError, match="bug"), report_unwritable(tmp_path):
        raise KeyError("bug")
    assert not list(tmp_path.iterdir())

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(Unwritable, match="No space left") as info, report_unwritable(tmp_path):
        float("what another library makes of it")
    assert isinstance(info.value.__cause__.__context__, ValueError)
