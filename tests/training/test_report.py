"""The page of runs."""

import base64
import re
import sys

import pytest

from sj_taid.training import cli, compare, report, run
from sj_taid.training.train import train


@pytest.fixture(scope="module")
def sweep(tiny, tmp_path_factory):
    """Two runs that differ in neuron and decoder."""
    folder = tmp_path_factory.mktemp("sweep")
    for neuron, decoder in (("alif", "taid"), ("lif", "fixed")):
        choices = {"neuron": neuron, "decoder": decoder}
        overrides = [f"{key}={value}" for key, value in choices.items()]
        cfg = tiny(*overrides, "pictures=true", "callbacks=quiet")
        command = " ".join(["sj-taid train", *overrides])
        train(cfg, folder / neuron, choices=choices, overrides=overrides, command=command)
    return folder


@pytest.fixture(scope="module")
def page(sweep):
    """The page's file, by the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["sj-taid", "report", str(sweep)])
        cli.main()
    return sweep / "report.html"


@pytest.mark.slow
def test_page_has_everything(page, sweep):
    html = page.read_text()
    assert html.count('<img src="data:image/png;base64,') == 6  # samples, reconstructions, curves
    best, *_ = sorted(run.Run(folder).metrics["fad"] for folder in sweep.glob("*lif"))
    heads, cells = (re.findall(f"<{tag}>(.*)</{tag}>", html) for tag in ("th", "td"))
    assert len(cells) == 2 * len(heads) and f"{best:.2f}" in cells[: len(heads)]
    for name in ("samples", "curves"):
        drawn = (sweep / "lif" / f"{name}.png").read_bytes()
        assert base64.b64encode(drawn).decode() in html


def test_page_shows_a_generator_whose_samples_are_alike_last(runs):
    finished = compare.gather([runs])
    finished[runs.resolve() / "1"] |= {"fad": 0.1, "sample_variance": 0.0}  # grey
    ranked, _ = report.rank(finished)
    assert [one["fad"] for one in ranked.values()] == [7.0, 8.0, 10.0, 0.1]


def test_page_shows_runs_without_pictures(runs):
    finished = compare.gather([runs])
    for metrics in finished.values():
        metrics["overrides"] = [one.replace("=lif", "=<b>") for one in metrics["overrides"]]
        metrics["choices"] = {"neuron": metrics["choices"]["neuron"].replace("lif", "<b>")}
    html = report.page(finished)
    assert "<img" not in html
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert "default-src 'none'" in html and "<script" not in html  # it runs and fetches nothing
    assert "7.50 ± 0.71" in html  # compare's groups
