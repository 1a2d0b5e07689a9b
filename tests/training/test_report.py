"""The page of runs: its content, and that a browser sorts it, turns it dark, fetches nothing."""

import base64
import json
import re
import shutil
import sys
from html import unescape

import pytest

from sj_taid.training import cli, compare, report, run
from sj_taid.training.train import train

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


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


def figures(html):
    return [json.loads(unescape(text)) for text in re.findall(r'data-figure="([^"]*)"', html)]


@pytest.mark.slow
def test_page_has_everything(page, sweep):
    html = page.read_text()
    titles = [figure["layout"]["title"]["text"] for figure in figures(html)]
    for name in ("reconstruction", "latent"):
        assert len([title for title in titles if title.startswith(f"{name} over")]) == 1
    assert html.count('<img src="data:image/png;base64,') == 4  # samples and reconstructions
    best, *_ = sorted(run.Run(folder).metrics["fad"] for folder in sweep.glob("*lif"))
    cells = re.findall(r"</i>(\w+)</td><td>(\w+)</td><td>([\d.]+)</td>", html)
    assert len(cells) == 2 and f"<td>{best:.2f}</td>" in html.partition("</tr>\n<tr>")[0]
    drawn = (sweep / "lif" / "samples.png").read_bytes()
    assert base64.b64encode(drawn).decode() in html


def test_page_shows_a_generator_that_learned_nothing_last(runs):
    finished = compare.gather([runs])
    grey = finished[runs.resolve() / "1"]  # the best, but as good untrained
    grey |= {"fad": 0.1, "fad_untrained": 0.1}
    ranked, _ = report.rank(finished)
    assert [one["fad"] for one in ranked.values()] == [7.0, 8.0, 10.0, 0.1]
    grey |= {"fad_untrained": 5.0, "sample_variance": 0.0}
    assert [*report.rank(finished)[0]][-1] == runs.resolve() / "1"


def test_page_shows_runs_without_checkpoints(runs):
    finished = compare.gather([runs])
    for metrics in finished.values():
        metrics["overrides"] = [one.replace("=lif", "=<b>") for one in metrics["overrides"]]
        metrics["choices"] = {"neuron": metrics["choices"]["neuron"].replace("lif", "<b>")}
    html = report.page(finished)
    assert html.count("no checkpoint of a run at") == 4
    assert "&lt;b&gt;" in html and "<b>" not in html.partition("<script>")[0]
    assert "7.50 ± 0.71" in html  # compare's groups


@pytest.fixture
def browser():
    if not CHROMIUM:
        pytest.skip("no chromium here; apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    with playwright.sync_playwright() as driver:
        # As root, which CI is, chromium refuses its sandbox.
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.mark.slow
def test_page_in_a_browser(page, browser):
    phone = {"viewport": {"width": 390, "height": 844}, "is_mobile": True, "has_touch": True}
    tab = browser.new_context(color_scheme="light", **phone).new_page()
    tab.set_default_timeout(120_000)  # a busy machine draws for long
    asked, said = [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.goto(page.as_uri())

    column = tab.locator("th").all_text_contents().index("reconstruction ↓")
    cells = f"[...document.querySelectorAll('tbody tr')].map(r => +r.cells[{column}].textContent)"
    head = tab.locator("th").nth(column)
    for order in ("ascending", "descending"):
        head.tap()
        assert head.get_attribute("aria-sort") == order
        assert tab.evaluate(cells) == sorted(tab.evaluate(cells), reverse=order == "descending")
    tab.locator("th", has_text="decoder").tap()
    words = tab.locator("tbody td:nth-child(2)").all_text_contents()
    assert words == ["fixed", "taid"]

    paper = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(paper) == "rgb(255, 255, 255)"
    tab.emulate_media(color_scheme="dark")
    assert tab.evaluate(paper) == "rgb(24, 24, 27)"

    for plot in tab.locator("[data-figure]").all():
        plot.locator(".main-svg").first.wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert said == []
