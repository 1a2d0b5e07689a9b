"""The pages: Python runs, commands parse, links resolve, tables match results."""

import argparse
import importlib
import importlib.util
import os
import re
import shlex
from pathlib import Path

import pages
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

import sj_taid
from sj_taid import doctor
from sj_taid.training import compare
from sj_taid.training.config import compose
from tests.training.conftest import CONF

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
RESULTS = [ROOT / "RESULTS.md", ROOT / "results" / "README.md"]
#: pages with instructions, those for developers included
GUIDES = [*PAGES, *(ROOT / path for path in ("CONTRIBUTING.md", "conf/README.md"))]
GUIDES += [ROOT / "tests" / "README.md", *sorted(ROOT.glob("experiments/**/*.md"))]
GUIDES += sorted(ROOT.glob("sj_taid/**/*.md"))
#: and the pages that record what was done
ALL_PAGES = [*GUIDES, ROOT / "CHANGELOG.md", *RESULTS]


def name_of(page):
    return f"{page.parent.name}/{page.stem}"


def read(path):
    return path.read_text(encoding="utf-8")


TEXTS = {page.stem: read(page) for page in PAGES}


def blocks(language):
    """Those of README and docs."""
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name, text in TEXTS.items()
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs_alone(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "block"})


@pytest.mark.parametrize("block", blocks("yaml"))
def test_yaml_block_composes(block, tmp_path):
    group = "dataset" if "\nname: " in block else "model"
    tmp_path.joinpath(group).mkdir()
    tmp_path.joinpath(group, "mine.yaml").write_text(block, encoding="utf-8")
    cfg = compose("train", [f"{group}=mine", f"hydra.searchpath=[file://{tmp_path}]"])
    assert f"_target_: {cfg[group]._target_}" in block


# ---- commands ----


def commands():
    """Every line of a console, and every command in the text."""
    programs = r"(?:python3?|sj-taid|make|pip|pytest|torchrun)\s"
    for page in [*GUIDES, *RESULTS]:
        lines = re.findall(rf"^\$ (.*)$|(?<!`)`({programs}[^`|]*)`", read(page), re.M)
        for line in dict.fromkeys(map("".join, lines)):
            # The reader fills in <day>.
            yield pytest.param(re.sub(r"<[^>]*>", "x", line), id=f"{page.stem}: {line[:60]}")


@pytest.mark.parametrize("page", [*GUIDES, *RESULTS], ids=name_of)
def test_choices_in_the_text_are_there(page):
    """Those of a group, alone or in a piece of a command."""
    for span in re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)):
        for key, value in (word.partition("=")[::2] for word in span.split()):
            if (CONF / key).is_dir() and re.fullmatch(r"[a-z][a-z0-9_,]*", value):
                missing = {*value.split(",")} - {path.stem for path in (CONF / key).glob("*.yaml")}
                assert not missing - {"mine"}, span


class Parsed(Exception):
    """Raised in place of what a command does once its arguments are parsed."""


@pytest.fixture
def parse_only(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_args(*arguments):
        parse(*arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)


@pytest.mark.slow
@pytest.mark.usefixtures("parse_only")
@pytest.mark.parametrize("line", [*commands()])
def test_command_parses(line):
    program, *words = shlex.split(os.path.expandvars(line), comments=True)
    words = [word for word in words if word not in ("...", "x")]
    if program == "torchrun":  # its options are its own
        program, *words = "sj-taid", *words[words.index("sj_taid") + 1 :]
    if "--config-dir" in words:  # whose files are the reader's
        OverridesParser.create().parse_overrides(words[1 : words.index("--config-dir")])
    elif program == "sj-taid" and words[0] in ("compare", "doctor"):
        with pytest.raises(Parsed):
            {"compare": compare, "doctor": doctor}[words[0]].main(words[1:])
    elif program == "sj-taid":
        given = [word for word in words[1:] if word != "-m" and "resume=" not in word]
        compose_each(words[0], given)
    elif program == "make":
        assert re.search(rf"^{words[0]}:", read(ROOT / "Makefile"), re.M)
    elif program == "pip":
        extras = {x for found in re.findall(r"\[(.*?)\]", line) for x in found.split(",")}
        assert extras <= {*re.findall(r"^([\w-]+) =$", read(ROOT / "setup.cfg"), re.M), "ctk"}
        assert "sj-taid" not in words, "no distribution of this name is published"
    elif program == "python" and words[0].endswith(".py"):
        assert (ROOT / words[0]).is_file()
        with pytest.raises(Parsed):
            importlib.import_module(Path(words[0]).stem).main(words[1:])
    elif program == "python":
        assert words[0] == "-c" or importlib.util.find_spec(words[1])
    elif program == "export":
        assert re.fullmatch(r"\w+=\S+", *words)
    else:
        assert program in ("pytest", "tensorboard")


def compose_each(config, words):
    choices = [
        [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.input_line]
        for override in OverridesParser.create().parse_overrides(words)
    ]
    for job in range(max(map(len, choices), default=1)):  # each choice of a sweep once
        given = [options[job % len(options)] for options in choices]
        if "hydra/launcher=gpus" in given:
            pytest.importorskip("ray", reason="needs the extra ray")
        compose(config, given, return_hydra_config=True)


# ---- links and names ----


def anchors(page):
    """GitHub's and MyST's names of the headings."""
    headings = re.findall(r"^#+ (.*)$", read(page), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=name_of)
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", read(page), flags=re.M | re.S)
    for link in re.findall(r"]\((?!https?:)([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_pages_that_the_documentation_includes_link_to_its_pages():
    for page in ROOT.glob("docs/*.md"):
        for included, first in re.findall(r"{include} (\S+)\n.*\n:start-line: (\d+)", read(page)):
            lines = read(page.parent / included).splitlines()[int(first) :]
            links = re.findall(r"]\((?!https?:)([^)#]+)", "\n".join(lines))
            assert links, included
            assert not [link for link in links if not re.fullmatch(r"docs/[\w-]+\.\w+", link)]


@pytest.mark.parametrize("name", ["sj_taid", *(f"sj_taid.{part}" for part in sj_taid._PARTS)])
def test_api_lists_every_public_name(name):
    if f"automodule:: {name}\n   :members:\n" not in TEXTS["api"]:
        for public in importlib.import_module(name).__all__:
            assert re.search(rf":: {name}\.{public}$", TEXTS["api"], re.M), public


def test_formulas_have_their_lines_and_no_sign_of_latex():
    spec = importlib.util.spec_from_file_location("docs_conf", ROOT / "docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    found = 0
    for path in ROOT.glob("sj_taid/**/*.py"):
        for text in re.findall(r"\.\. math::(.*\n(?:\n? {8,}.*\n)*)", read(path)):
            lines, mathml = len(re.split(r"\\\\|\n\n", text.strip())), conf.as_mathml(text)
            assert mathml.count("<mtr>") == (lines if lines > 1 else 0), text
            assert not re.search(r">(&|&amp;|\\\w+)<", mathml), text
            found += lines > 1
    assert found
    for text in ("a & b", r"\nosuch a", r"\mathrm{a} \tfracc12"):
        with pytest.raises(ValueError, match="is not translated, of the formula"):
            conf.as_mathml(text)


def test_environment_lists_every_variable():
    folders = ("sj_taid/**/*.py", "experiments/**/*.py", "conf/**/*.yaml")
    code = "".join(read(path) for folder in folders for path in ROOT.glob(folder))
    named = re.findall(r"`(SJ_[A-Z_]+)`", TEXTS["install"])
    assert {*named} == {*re.findall(r"\bSJ_[A-Z_]+\b", code)}


def test_named_files_and_tests_exist():
    text = read(ROOT / "CONTRIBUTING.md")
    paths = {path for path in re.findall(r"`([\w./]+/[\w./]*)`", text) if "NAME" not in path}
    assert not [path for path in paths if not (ROOT / path).exists()]
    tests = "".join(read(path) for path in ROOT.glob("tests/**/test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 5 and not [name for name in named if f"def {name}(" not in tests]


# ---- tables ----


@pytest.mark.parametrize("page", [*PAGES, *RESULTS], ids=name_of)
def test_table_is_made_from_results(page):
    tables = r"<!-- table: \w+ -->.*?<!-- end -->"
    by_hand = re.findall(r"^\|.*\|$", re.sub(tables, "", read(page), flags=re.S), re.M)
    assert not [row for row in by_hand if re.search(r"\|\s*[-+]?\d+\.\d+[^|\w.]*\|", row)]
    assert page in pages.PAGES
    assert read(page) == pages.fill(page), "make tables"
