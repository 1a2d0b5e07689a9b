"""Progress of what takes long: a bar where somebody looks, a line now and then elsewhere."""

import logging
import threading
from types import SimpleNamespace

from rich.console import Console

from sj_taid.data import progress


def test_without_a_terminal_there_is_a_line_every_so_often(monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    now = iter(range(0, 10_000, 10))  # ten seconds from one look at the clock to the next
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    assert list(progress.followed([1, 2, 3, 4, 5], "Counting")) == [1, 2, 3, 4, 5]
    assert caplog.messages == ["Counting: 2 of 5"]
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: 0))
    assert list(progress.followed(iter("ab"), "Quick")) == ["a", "b"]
    assert len(caplog.messages) == 1 and capsys.readouterr().out == ""


def test_in_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress, "Console", lambda: Console(force_terminal=True, width=80))
    assert list(progress.followed("abc", "Looking")) == ["a", "b", "c"]
    assert "Looking" in capsys.readouterr().out


def test_files_that_others_write_are_counted(monkeypatch, tmp_path):
    said, three, running = [], threading.Event(), threading.active_count()

    def say(text, *values):
        said.append(text % values)
        if len(said) == 3:
            three.set()

    monkeypatch.setattr(progress, "log", SimpleNamespace(info=say))
    monkeypatch.setattr(progress, "EVERY", 0)
    monkeypatch.setattr(progress, "LOOK", 0.001)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "before").touch()
    with progress.files_followed([tmp_path / "raw", tmp_path / "made"], "Making", 4):
        (tmp_path / "made" / "a").mkdir(parents=True)
        for path in ("raw/0", "made/1", "made/a/2"):
            (tmp_path / path).touch()
        assert three.wait(10)
    assert said == [f"Making: {number} of 4" for number in range(3)]
    assert threading.active_count() == running
