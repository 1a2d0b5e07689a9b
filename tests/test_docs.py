"""What the documentation shows is so: its Python runs, its commands parse, its tables are made,
its links resolve, and it names what is there."""

import argparse
import configparser
import importlib
import importlib.util
import os
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import sj_taid

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.joinpath("docs").glob("*.md"))]
TEXTS = {page.stem: page.read_text(encoding="utf-8") for page in PAGES}
#: with those for who works on it
INSTRUCTIONS = [
    *PAGES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "tests" / "README.md",
    *sorted(ROOT.glob("experiments/**/*.md")),
    *sorted(ROOT.glob("sj_taid/**/*.md")),
]
#: with those that tell what was done
ALL_PAGES = [*INSTRUCTIONS, ROOT / "CHANGELOG.md", ROOT / "RESULTS.md"]


def blocks(language):
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name, text in TEXTS.items()
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S))
    ]


@pytest.mark.parametrize("block", blocks("python"))
def test_each_block_of_python_runs_by_itself(block):
    exec(compile(block, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("block", blocks("yaml"))
def test_each_block_of_yaml_is_a_data_set_that_composes(block, tmp_path):
    pytest.importorskip("hydra", reason="needs the extra train")
    from sj_taid.training.composing import compose

    tmp_path.joinpath("dataset").mkdir()
    tmp_path.joinpath("dataset", "mine.yaml").write_text(block, encoding="utf-8")
    cfg = compose("train", ["dataset=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    assert f"name: {cfg.dataset.name}" in block


def test_no_block_is_of_a_kind_that_nothing_tests():
    kinds = {kind for text in TEXTS.values() for kind in re.findall(r"^```(\S+)", text, re.M)}
    # Sphinx reads the directives, text is what no program reads.
    tested = {"python", "yaml", "console", "bash"}
    assert {kind for kind in kinds if kind[0] != "{"} <= tested | {"text"}


def test_most_pages_have_python():
    assert len({param.id.partition("-")[0] for param in blocks("python")}) >= 7


# ---- commands ----


PROGRAMS = "python3? |sj-taid |make |pip |pytest |torchrun "


def commands():
    """Every line of a console or of a script, and every command in the text."""
    for page in INSTRUCTIONS:
        name, text = page.stem, page.read_text(encoding="utf-8")
        lines = re.findall(r"^\$ (.*)$", text, re.M)
        for script in re.findall(r"^```bash\n(.*?)^```", text, re.M | re.S):
            lines += script.splitlines()
        lines += re.findall(rf"^    ((?:{PROGRAMS}).*)$", text, re.M)
        lines += re.findall(rf"`((?:{PROGRAMS})[^`|]*)`", text)
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
    if program == "torchrun":  # its options are its own
        program, *words = "python", *words[[word[-3:] for word in words].index(".py") :]
    if program == "python" and words[0] == "-m":
        assert importlib.util.find_spec(words[1])
        program, *words = words[1:]
    if program == "pytest":
        settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]
        markers = [line.partition(":")[0] for line in settings["ini_options"]["markers"]]
        assert not words or (words[0] == "-m" and words[1] in markers)
    elif program == "ray":
        scripts = pytest.importorskip("ray.scripts.scripts", reason="needs the extra ray")
        scripts.cli.commands[words[0]].make_context(words[0], words[1:])
    elif program in ("sj_taid.doctor", "build"):
        assert not set(words) - {"--kernels"}
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
    from sj_taid.training import cli

    if is_benchmark or command in cli.OTHERS:
        run = importlib.import_module(command).main if is_benchmark else cli.OTHERS[command]
        with pytest.raises(Parsed):
            run(words)
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
        if "hydra/launcher=gpus" in given:
            pytest.importorskip("ray", reason="needs the extra ray")
        compose(config, given, return_hydra_config=True)


def test_every_command_that_is_named_is_there():
    cli = pytest.importorskip("sj_taid.training.cli", reason="needs the extra train")
    paths = [*ALL_PAGES, *ROOT.glob("docs/**/*.ipynb"), *ROOT.glob("conf/**/*.yaml")]
    paths += [*ROOT.glob("sj_taid/**/*.py"), *ROOT.glob("experiments/**/*.py")]
    named = {
        (word, path.name)
        for path in paths
        for word in re.findall(r"\bsj-taid ([a-z][\w-]*)", path.read_text(encoding="utf-8"))
    }
    in_a_sentence = {"ask", "developers", "is", "needs", "then"}
    there = {*cli.COMPOSED, *cli.OTHERS}
    assert {"evaluate", "export", "fit_prior", "prove", "train"} <= {word for word, _ in named}
    assert not {(word, page) for word, page in named if word not in there | in_a_sentence}


# ---- links and names ----


def anchors(page):
    """GitHub's and MyST's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.stem)
def test_links_between_files_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in re.findall(r"]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_contents():
    contents = "".join(re.findall(r"^```{toctree}\n(.*?)^```", TEXTS["index"], re.M | re.S))
    docs = ROOT / "docs"
    paths = [*docs.glob("**/*.md"), *docs.glob("**/*.ipynb")]
    pages = {path.relative_to(docs).with_suffix("").as_posix() for path in paths} - {"index"}
    assert {"models", "notebooks/gpu", "notebooks/quickstart"} < pages
    assert pages == set(re.findall(r"^[\w/]+$", contents, re.M))


@pytest.mark.parametrize("name", ["sj_taid", *(f"sj_taid.{part}" for part in sj_taid._PARTS)])
def test_every_public_name_is_in_the_api(name):
    if f"automodule:: {name}\n   :members:\n" not in TEXTS["api"]:
        pytest.importorskip({"sj_taid.lightning": "lightning"}.get(name, "torch"))
        for public in importlib.import_module(name).__all__:
            assert re.search(rf":: {name}\.{public}$", TEXTS["api"], re.M), public


def test_every_environment_variable_is_on_its_page():
    sources = [*ROOT.glob("sj_taid/**/*.py"), *ROOT.glob("experiments/**/*.py")]
    sources += [*ROOT.glob("conf/**/*.yaml")]
    read = r"(?:environ(?:\.get)?[\[(]|getenv\(|oc\.env:)\W?([A-Z][A-Z_]+)|\b(SJ_[A-Z_]+)\b"
    found = {
        name
        for path in sources
        for match in re.findall(read, path.read_text(encoding="utf-8"))
        for name in match
        if name
    }
    # The constant that holds a name.
    found.discard("ENVIRONMENT_VARIABLE")
    assert len(found) >= 4
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", TEXTS["environment"]))
    assert found <= named
    assert {name for name in named if name.startswith("SJ_")} <= found


def test_every_picture_is_in_the_gallery_above_its_command():
    shown = re.findall(r"\(images/([^)]+)\)|^\$ (sj-taid .*)$", TEXTS["gallery"], re.M)
    pictures = [picture for picture, _ in shown if picture]
    assert sorted(pictures) == sorted(
        path.name for path in ROOT.joinpath("docs", "images").iterdir()
    )
    assert shown[-1][1], "the last pictures have no command under them"


# ---- tables ----


@pytest.mark.parametrize("page", [*PAGES, ROOT / "RESULTS.md"], ids=lambda page: page.name)
def test_no_measured_figure_is_typed_into_a_table(page):
    text = page.read_text(encoding="utf-8")
    by_hand = re.sub(r"<!-- table: \w+ -->.*?<!-- end -->", "", text, flags=re.S)
    rows = re.findall(r"^\|.*\|$", by_hand, re.M)
    assert not [row for row in rows if re.search(r"\|\s*[-+]?\d+\.\d+[^|\w.]*\|", row)]


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
