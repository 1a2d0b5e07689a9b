"""Every experiment runs: one batch of made-up data through its own config, made small."""

import json

import pytest
import torch
from omegaconf import OmegaConf
from spikingjelly.activation_based.neuron import LIFNode

from sj_taid.data.base import Data, InMemory
from sj_taid.training import classification, columns, gather, results_page, run
from sj_taid.training.commands import train
from sj_taid.training.composing import compose, instantiate
from tests.training.conftest import CONF, TINY, TINY_CLASSIFICATION, write_images

EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.fixture
def small(tiny):
    """An experiment's config with the tests' sizes in place of its own."""

    def make(name):
        cfg = tiny(f"experiment={name}", tiny=False)
        sizes = [*TINY, *TINY_CLASSIFICATION, "dataset.T=2", "dataset.num_workers=0"]
        for override in sizes:
            key, _, value = override.partition("=")
            if OmegaConf.select(cfg, key) is not None and key not in ("task", "model"):
                OmegaConf.update(cfg, key, OmegaConf.create(f"x: {value}").x)
        return cfg

    return make


@pytest.fixture
def made_up(monkeypatch):
    """Twelve samples in place of every data set's own."""

    def load(self):
        torch.manual_seed(0)
        frames = [self.T] if hasattr(self, "T") else []
        shape = (12, *frames, self.channels, self.image_size, self.image_size)
        samples = InMemory(
            torch.randint(0, 256, shape, dtype=torch.uint8), torch.arange(12) % (self.classes or 1)
        )
        return samples, samples

    for cls in (Data, *subclasses(Data)):
        monkeypatch.setattr(cls, "prepare_data", lambda self: None)
        monkeypatch.setattr(cls, "load", load)


def subclasses(cls):
    return {cls, *(deeper for child in cls.__subclasses__() for deeper in subclasses(child))}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_runs(small, made_up, tmp_path, name):
    cfg = small(name)
    # They take most of the time: here those of each data set and of our best.
    cfg.pictures = name.endswith((results_page.SMALL_BUDGET, "_sharp"))
    metrics = train(cfg, tmp_path, command=f"python experiments/train.py experiment={name}")
    assert metrics[cfg.objective] >= 0 and metrics["epochs"] == 1
    assert {cfg.objective, *metrics.get("protocol", {})} <= columns.METRICS.keys()
    assert json.loads((tmp_path / run.METRICS).read_text())["command"].endswith(name)


# What the end of a paper row's name promises: model, neuron, decoder.
ROWS = {
    "vae": ("vae", None, None),
    "fsvae": ("fsvae", "lif", "fixed"),
    "taid": ("fsvae", "lif", "taid"),
    "taid_temporal": ("fsvae", "lif", "taid_temporal"),
    "esvae": ("esvae", "lif", "fixed"),
    "esvae_taid": ("esvae", "lif", "taid"),
    "esvae_taid_temporal": ("esvae", "lif", "taid_temporal"),
    "esvae_sharp": ("esvae", "alif", "taid_place"),
    "fsvae_sharp": ("fsvae", "alif", "fixed"),
    **{neuron: ("classifier", neuron, None) for neuron in ("alif", "plif", "lif")},
    "tet": ("classifier", "alif", None),
}


# What the small ones promise of their model.
SMALL_ROWS = {
    "small": "fsvae",
    "esvae": "esvae",
    **dict.fromkeys(("classifier", "recipe", "dead_start"), "classifier"),
}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_what_its_name_says(name):
    cfg = compose("train", [f"experiment={name}"], return_hydra_config=True)
    choices = cfg.hydra.runtime.choices
    data, row = cfg.dataset.name, name.removeprefix(f"{cfg.dataset.name}_")
    assert choices["dataset"] == data
    assert results_page.comment(name).endswith(".")
    if name in gather.STUDIES:
        assert cfg.hydra.sweeper.params
        return
    assert name.startswith(data)
    if name.endswith(results_page.SMALL_BUDGET):
        assert choices["model"].startswith(SMALL_ROWS[row.removesuffix("_cpu")])
        return
    model, neuron, decoder = ROWS[row]
    assert choices["model"].startswith(model)
    assert (choices["neuron"], choices["decoder"]) == (neuron, decoder)


def test_folders_of_classes_are_counted_and_name_the_confusion(tiny, tmp_path, monkeypatch):
    for name in ("cat", "dog", "emu"):
        write_images(tmp_path / "images" / name, 10)
    data = ["dataset=image_folder", f"dataset.root={tmp_path / 'images'}", "dataset.num_workers=0"]
    drawn = []
    monkeypatch.setattr(classification, "save", lambda figure, path: drawn.append(figure))
    choices = [*data, *TINY_CLASSIFICATION, "pictures=true"]
    train(tiny(*choices, tiny=False), tmp_path / "run")
    (figure,) = drawn
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert names == ["cat", "dog", "emu"]
    assert run.load_model(tmp_path / "run").classes == 3


# One file each, in a folder of one's own.
OWN = {
    "dataset": "defaults: [base]\n_target_: sj_taid.data.Digits\nname: own\nchannels: 1\n"
    "classes: 10\nimage_size: 16\nbatch_size: 8\n",
    "neuron": "defaults: [lif]\nv_threshold: 0.7\n",
    "metric": "defaults: [small]\nsamples: 50\n",
    "experiment": "# @package _global_\ndefaults: [part/small, override /dataset: own,"
    " override /neuron: own, override /metric: own]\ntrainer: {max_epochs: 2}\n",
}


def test_a_data_set_a_neuron_a_metric_and_a_row_of_ones_own_are_a_file_each(tiny, tmp_path):
    for group, text in OWN.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "own.yaml").write_text(text)
    there = f"hydra.searchpath=[file://{tmp_path}]"
    cfg = tiny(there, "experiment=own", tiny=False)
    data = instantiate(cfg.dataset)
    assert (data.name, data.num_workers, cfg.trainer.max_epochs) == ("own", 0, 2)
    model = instantiate(cfg.model)
    assert model.image_size == 16
    assert {node.v_threshold for node in model.modules() if isinstance(node, LIFNode)} == {0.7}
    evaluator = instantiate(cfg.metric, seed=1)
    assert (evaluator.samples, evaluator.autoencoder["latent_channels"], evaluator.seed) == (
        50,
        16,
        1,
    )
    # Which metric measures a data set is said there, if not grey.
    assert tiny(there, "dataset=own", tiny=False).metric.samples == 5000
    assert tiny(there, "dataset=own", "task=classification", tiny=False).get("metric") is None
