"""The committed runs and the tables made of them."""

import inspect
import re

import pages
import pandas as pd
import pytest
from spikingjelly.activation_based import neuron

import sj_taid
from sj_taid._internal import compat
from sj_taid.training import compare
from sj_taid.training.config import compose
from tests.training.conftest import CONF, metrics

# ---- the store ----


def test_store_names_runs_by_their_choices(runs, tmp_path):
    finished = compare.gather([runs])
    finished[tmp_path / "other"] = metrics(["neuron=lif"], fad=1.0)
    lines = [*pages.store(finished, tmp_path)]
    assert lines[-1] == f"not stored: {tmp_path / 'other'} (it is no run of experiment=...)"
    stored = sorted(path.stem for path in (tmp_path / "runs" / "mnist_small_cpu").iterdir())
    assert stored == ["neuron-lif-seed-0", "neuron-lif-seed-1", "seed-0", "seed-1"]
    loaded = pages.load_runs("mnist_small_cpu", tmp_path)
    assert [one["fad"] for one in loaded] == [10.0, 12.0, 7.0, 8.0]


# ---- the tables ----


def single(decoder, neuron, seed, error, *more, fad=1.0, by="one autoencoder"):
    choices = {"decoder": decoder, "neuron": neuron}
    words = ["experiment=mnist_esvae_cpu", *(f"{k}={v}" for k, v in choices.items()), *more]
    figures = {"reconstruction": error, "fad_published": 2 * error, "fad": fad}
    return metrics(words, choices, seed, **figures) | {"protocol": {"fad": by}}


def test_decoders_are_compared_by_runs_of_one_seed_and_neuron(monkeypatch):
    runs = [
        *(single("fixed", "lif", 0, 2.0), single("taid", "lif", 0, 1.0, fad=1.5)),
        # own FAD of another autoencoder
        *(single("fixed", "lif", 1, 4.0), single("taid", "lif", 1, 5.0, fad=9.0, by="another")),
        *(single("taid", "alif", 0, 9.0), single("fixed", "plif", 0, 9.0)),
        single("taid", "lif", 1, 9.0, "model.latent_channels=128"),  # of other choices
    ]
    monkeypatch.setattr(pages, "experiments", lambda: ["mnist_esvae_cpu"])
    monkeypatch.setattr(pages, "load_runs", lambda name: runs)
    table = pages.decoders().drop(columns="epochs")
    assert table.to_numpy().tolist() == [
        ["mnist_esvae_cpu", "LIF", "taid", "-12.5 ± 53.0", "+50.0", "-12.5 ± 53.0", "2"]
    ]


def test_a_model_is_chosen_by_one_half_and_judged_by_the_other(tmp_path, monkeypatch):
    fads = {("A", "one"): (4, 6), ("A", "two"): (3, 5), ("A", "training images"): (1, 1)}
    fads |= {("B", "one"): (2, 2), ("B", "two"): (7, 9), ("B", "training images"): (1, 3)}
    rows = [
        {"dataset": "mnist", "images": half, "of": of, "draw": draw, "fad": fad}
        for (half, of), two in fads.items()
        for draw, fad in enumerate(two)
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "halves.csv")
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    assert [[*draws] for *_, draws in pages.judged()] == [[7, 9], [1, 3]]


def test_stored_runs_name_no_place_of_images(tmp_path):
    words = ["experiment=fsvae", "dataset=mnist", "dataset.root=/my/images"]
    words += ["metric.published_autoencoders=/mine"]
    assert len([*pages.store({tmp_path: metrics(words)}, tmp_path)]) == 1
    for folder in (tmp_path, pages.RESULTS):
        for path in folder.rglob("*.json"):
            assert not re.search(r'[" =]/\w+/|_?root=', path.read_text()), path


class Mean(neuron.BaseNode):
    def single_step_functional_forward(self, inputs, states, **kwargs):
        (x,), (v,) = inputs, states
        return (self.surrogate_function(x - x.mean()),), (v,)


def test_a_neuron_is_not_read_with_a_reason():
    assert pages.read_neuron(Mean) == ("not read: its step has mean, which is not pointwise", "")


def test_neurons_of_another_version_leave_their_table(monkeypatch):
    page = pages.ROOT / "docs" / "accelerate.md"
    monkeypatch.setattr(pages, "version", lambda name: "2.0.1")
    assert pages.fill(page) == page.read_text(encoding="utf-8")


@pytest.mark.slow  # compiles each neuron
@pytest.mark.parametrize(
    "kind",
    [k for k in vars(neuron).values() if inspect.isclass(k) and issubclass(k, compat.NEURONS)],
)
def test_accelerate_does_what_the_table_of_neurons_says(kind):
    node = kind(**pages.NEEDED.get(kind.__name__, {}))
    node.step_mode = "m"
    row = sj_taid.accelerate(node).rows[0]
    said, _ = pages.read_neuron(kind)
    notes = {"equal to the bit": "equal outputs", "equal to rounding": "equal outputs to rounding"}
    reason = row.note.partition("; swap_neurons(")[0]  # the remedy
    assert reason.rstrip(": ") == notes.get(said, said.removeprefix("not read: "))


# ---- the committed results ----


def test_published_values_have_a_source():
    published = pd.read_csv(pages.RESULTS / "published.csv")
    assert published["source"].notna().all() and (published["value"] > 0).all()


@pytest.mark.slow  # composes a hundred configs
@pytest.mark.parametrize("name", pages.experiments())
def test_stored_runs_can_be_had_again_by_todays_configs(name):
    """By the words of their table and row: the same parts, for as many epochs."""
    composed = set()
    for stored in pages.load_runs(name):
        words = pages.join(pages.recipe(name)[1], pages.choices_of(name, stored))
        words = [word for word in words if pages.key_of(word) != "seed"]
        if composed >= {*words}:
            continue
        composed |= {*words}
        cfg = compose("train", words, return_hydra_config=True)
        chosen = cfg.hydra.runtime.choices
        told = {key: kind for key, kind in stored["choices"].items() if key in pages.SHOWN and kind}
        assert told.items() <= dict(chosen).items(), words
        stops = "enough" in (cfg.callbacks or {})  # before, where it is good enough
        assert stored["epochs"] == cfg.trainer.max_epochs or stops, words


def test_models_of_results_are_of_experiments():
    recipes = {path.stem for path in (CONF / "experiment").glob("*.yaml")}
    recipes |= {*pd.read_csv(pages.RESULTS / "recipes.csv")["experiment"]}
    for path in pages.RESULTS.glob("*.csv"):
        for command in pd.read_csv(path).get("trained_by", pd.Series(dtype=str)):
            assert re.search(r" experiment=(\w+) ", command)[1] in recipes


def test_a_script_of_a_result_is_there_or_the_page_says_where():
    told = (pages.ROOT / "RESULTS.md").read_text().partition("Scripts that are gone")[2]
    told = told.partition("\n\n")[0]
    tables = [*pages.RESULTS.rglob("*.csv"), *pages.BENCHMARKS.rglob("*.csv")]
    stored = pages.RESULTS.rglob("*.json")
    named = (re.findall(r"python (\S+\.py)", path.read_text()) for path in (*tables, *stored))
    scripts = {script for scripts in named for script in scripts}
    assert len(scripts) > 9
    for script in scripts:
        assert (pages.ROOT / script).is_file() or f"`{script.removeprefix('experiments/')}`" in told


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([0.9, 0.8, 0.9], [1.0, 1.0, 1.0], "better, -13 %"),
        ([1.0, 1.0, 1.0], [0.9, 0.8, 0.9], "worse, +15 %"),
        ([0.5, 0.5, 1.1], [1.0, 1.0, 1.0], "no difference, -30 %"),
        ([0.96, 0.96, 0.96], [1.0, 1.0, 1.0], "no difference, -4 %"),
        ([0.5, 0.5], [1.0, 1.0, 1.0], "2 of 3 runs"),
    ],
)
def test_verdict_by_the_rule_of_the_comparison(ours, theirs, expected):
    series = pd.Series(ours, name="taid"), pd.Series(theirs, name="mean")
    assert pages.verdict(*series) == expected


def test_verdict_is_none_against_itself():
    assert pages.verdict(pd.Series([1.0], name="taid"), pd.Series([1.0], name="taid")) == ""
