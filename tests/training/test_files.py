"""What cannot be written is told from what else may go wrong."""

import errno
import pickle

import pytest

from sj_taid.training.files import Unwritable, atomic_write, report_unwritable, unwritable


def test_the_error_goes_from_process_to_process(tmp_path):
    error = unwritable(tmp_path, OSError("no space"))
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is Unwritable and str(again) == str(error)
    assert str(error).startswith(f"{tmp_path} cannot be written (no space); ")


def test_what_else_fails_within_a_write_is_not_blamed_on_the_place(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(FileNotFoundError, match="elsewhere"), atomic_write(path):
        (tmp_path / "elsewhere").read_text()
    with pytest.raises(Unwritable, match="what was there before is whole"), atomic_write(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "before" and [*tmp_path.iterdir()] == [path]


def refused(error, folder):
    """What becomes of an error that another one hides."""
    try:
        with report_unwritable(folder):
            try:
                raise error
            except OSError:
                float("what another library makes of it")
    except (OSError, ValueError) as found:
        return type(found)


def test_what_others_cannot_write_is_found_behind_their_error(tmp_path):
    inside, outside = str(tmp_path / "events"), str(tmp_path.parent / "elsewhere")
    assert refused(OSError(errno.EACCES, "Permission denied", inside), tmp_path) is Unwritable
    assert refused(OSError(errno.ENOSPC, "No space left on device"), tmp_path) is Unwritable
    assert refused(OSError(errno.EACCES, "Permission denied", outside), tmp_path) is ValueError
    assert refused(OSError(errno.EACCES, "Permission denied"), tmp_path) is ValueError  # a port


def test_an_error_that_was_left_behind_does_not_count(tmp_path):
    with pytest.raises(ValueError, match="wrong"), report_unwritable(tmp_path):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError:
            raise ValueError("wrong") from None
