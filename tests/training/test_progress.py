"""Progress of what takes long: a bar where somebody looks, a line now and then elsewhere."""

import logging
from types import SimpleNamespace

from rich.console import Console

from sj_taid.training import progress


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
