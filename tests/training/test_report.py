"""The page of runs: its content, and that a browser sorts it, turns it dark, fetches nothing."""

import base64
import re
import shutil
import sys

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


@pytest.mark.slow
def test_page_has_everything(page, sweep):
    html = page.read_text()
    assert html.count('<img src="data:image/png;base64,') == 6  # samples, reconstructions, curves
    best, *_ = sorted(run.Run(folder).metrics["fad"] for folder in sweep.glob("*lif"))
    cells = re.findall(r"<tr><td>(\w+)</td><td>(\w+)</td><td>([\d.]+)</td>", html)
    assert len(cells) == 2 and f"<td>{best:.2f}</td>" in html.partition("</tr>\n<tr>")[0]
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
    tab.set_default_timeout(120_000)  # a busy machine
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

    assert tab.evaluate("document.documentElement.scrollWidth") == 390  # nothing sticks out
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert said == []
