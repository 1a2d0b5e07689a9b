"""A file is written whole or not at all."""

import pytest

from sj_taid.training.files import atomic_write


def test_atomic_write_leaves_what_was_there_after_an_error(tmp_path):
    path = tmp_path / "below" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("before")
    with pytest.raises(OSError, match="no space"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError("no space")
    assert path.read_text() == "before" and [*path.parent.iterdir()] == [path]
