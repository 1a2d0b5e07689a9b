"""What the documentation shows is so: its Python runs, its commands parse, its tables are made."""

import argparse
import configparser
import importlib
import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.joinpath("docs").glob("*.md"))]
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}


def blocks(language):
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name, text in TEXTS.items()
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S))
    ]


@pytest.mark.parametrize("block", blocks("python"))
def test_each_block_of_python_runs_by_itself(block):
    exec(compile(block, "block", "exec"), {"__name__": "block"})


def test_most_pages_have_python():
    assert len({param.id.partition("-")[0] for param in blocks("python")}) >= 7


# ---- commands ----


def commands():
    """Every line of a console, and every command in the text."""
    for name, text in TEXTS.items():
        lines = re.findall(r"^\$ (.*)$", text, re.M)
        lines += re.findall(r"`((?:python3? |sj-taid |make |pip )[^`|]*)`", text)
        for line in dict.fromkeys(lines):
            # What the reader fills in: <day>, FOLDER as they stand, "..." for more of the same.
            yield pytest.param(re.sub(r"<[^>]*>", "x", line), id=f"{name}: {line[:60]}")


class Parsed(Exception):
    """In place of what a command does once its arguments are understood."""


@pytest.fixture
def parse_only(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_args(*arguments):
        parse(*arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.mark.parametrize("line", list(commands()))
def test_each_command_is_understood(line, parse_only):
    program, *words = shlex.split(os.path.expandvars(line), comments=True)
    words = [word for word in words if word not in ("...", "x")]
    if program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    elif program == "python" and words[0] != "-c":
        script = ROOT / words[0]
        assert script.is_file()
        understood(script.stem, script.parent.name == "benchmark", words[1:])
    elif program == "sj-taid":
        understood(words[0], False, words[1:])
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.M)
    elif program == "pip":
        extras = [x for found in re.findall(r"\[(.*?)\]", line) for x in found.split(",")]
        config = configparser.ConfigParser()
        config.read(ROOT / "setup.cfg")
        assert set(extras) <= {*config["options.extras_require"], "ctk"}
        assert "sj-taid" not in words, "no distribution of this name is published"
    else:
        assert (program, words[0]) == ("python", "-c")


def understood(command, is_benchmark, words):
    pytest.importorskip("hydra", reason="needs the extra train")
    if is_benchmark or command in ("compare", "export", "report", "search"):
        module = importlib.import_module(command if is_benchmark else f"sj_taid.training.{command}")
        with pytest.raises(Parsed):
            module.main(words)
    elif command == "pages":
        assert not words
    else:
        compose_each(command, [word for word in words if word not in ("-m", "--dry-run")])


def compose_each(config, words):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    from sj_taid.training.composing import compose

    choices = [
        [f"{word.partition('=')[0]}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [word]
        for word, override in zip(
            words, OverridesParser.create().parse_overrides(words), strict=True
        )
    ]
    for job in range(max(map(len, choices), default=1)):  # each choice of a sweep once
        given = [options[job % len(options)] for options in choices]
        compose(config, given, return_hydra_config=True)


# ---- tables ----


@pytest.mark.parametrize("page", [*PAGES, ROOT / "RESULTS.md"], ids=lambda page: page.name)
def test_tables_are_what_is_made_of_the_results(page):
    pytest.importorskip("pandas", reason="the tables are made with the extra train")
    from experiments import pages

    assert page in pages.PAGES
    assert page.read_text(encoding="utf-8") == pages.filled(page), "make tables"


def test_make_help_lists_every_command():
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony.split() == re.findall(r"^([a-z-]+):.* ## [A-Z.]", makefile, re.M)


def test_contributing_names_what_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = {word for word in re.findall(r"`([\w.]+/[\w./]*)`", text) if "NAME" not in word}
    assert len(paths) > 15
    assert not [path for path in paths if "_ROW" not in path and not (ROOT / path).exists()]
    tests = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("tests/**/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 8 and not [name for name in named if f"def {name}(" not in tests]
