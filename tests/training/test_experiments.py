"""Recipes compose, and each kind of them trains on a batch of random data at a small size."""

import re

import pandas as pd
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from spikingjelly.activation_based.neuron import LIFNode

from sj_taid._internal.build import find_class
from sj_taid.data import Samples
from sj_taid.training import compare
from sj_taid.training.config import compose
from sj_taid.training.parts import Parts
from sj_taid.training.train import train
from tests.training.conftest import CONF, TINY, TINY_CLASSIFICATION

#: Those that train; the others differ from them in sizes and data.
KINDS = [
    "fsvae dataset=celeba pictures=true",  # in colour
    "classifier dataset=nmnist pictures=true",  # recordings
    *("mnist_esvae_sharper", "cifar10_esvae_cpu", "start_map"),
]
RESULTS = CONF.parent / "results"
PUBLISHED = pd.read_csv(RESULTS / "published.csv").dropna(subset="command")
#: Of recipes that are there, and of others that stored runs were made by.
COMMANDS = [
    *sorted(f"experiment={path.stem}" for path in (CONF / "experiment").glob("*.yaml")),
    *pd.read_csv(RESULTS / "recipes.csv")["command"],
]
#: The model, neuron and decoder of each row of the papers' tables.
ROWS = {
    "FSVAE": ("fsvae", "lif", "fixed"),
    "TAID": ("fsvae", "lif", "taid"),
    "ESVAE": ("esvae", "lif", "fixed"),
    "ALIF": ("classifier", "alif", None),
    "PLIF": ("classifier", "plif", None),
}


@pytest.mark.parametrize(
    ("row", "command"), PUBLISHED[["row", "command"]].drop_duplicates().to_records(index=False)
)
def test_published_command_chooses_its_row(row, command):
    cfg = compose("train", command.split(), return_hydra_config=True)
    chosen = cfg.hydra.runtime.choices
    model, neuron, decoder = ROWS[row]
    assert f"dataset={chosen['dataset']}" in command.split()
    assert chosen["model"].startswith(model)
    assert (chosen["neuron"], chosen["decoder"]) == (neuron, decoder)


@pytest.mark.parametrize("command", COMMANDS)
def test_recipe_composes(command):
    words = command.split()
    if words[0] == "-m":  # the first job of a sweep
        words = [re.sub(r"=([^\[,]*),.*", r"=\1", word) for word in words[1:]]
    cfg = compose("train", words)
    for part in (cfg.dataset, cfg.optimizer, cfg.trainer, cfg.model):
        instantiate(part)


@pytest.fixture
def random_data(monkeypatch):
    """Random samples, as many as a flow needs, in place of every data set's own."""

    def load_data(parts):
        data = parts.data
        frames = [data.T] if hasattr(data, "T") else []
        shape = (30, *frames, data.channels, data.image_size, data.image_size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        samples = Samples(images, torch.arange(30) % (data.classes or 1))
        data.prepare_data, data.load = lambda: None, lambda: (samples, samples)
        data.setup()
        return data

    monkeypatch.setattr(Parts, "load_data", load_data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_recipe_trains(random_data, tmp_path, kind):
    cfg = compose("train", ["pictures=false", *f"experiment={kind}".split()])
    small = ["dataset.T=2", "dataset.num_workers=0", "model.flow_epochs=1"]
    for override in [*TINY, *TINY_CLASSIFICATION, *small]:
        key, _, value = override.partition("=")
        if OmegaConf.select(cfg, key) is not None and key not in ("task", "model", "pictures"):
            OmegaConf.update(cfg, key, OmegaConf.create(f"x: {value}").x)
    metrics = train(cfg, tmp_path)
    assert metrics[cfg.objective] >= 0 and metrics["epochs"] == 1
    # Precision and recall of another prior have no columns of their own.
    other = re.compile("_(precision|recall)_")
    named = {name for name in metrics.get("protocol", {}) if not other.search(name)}
    assert {cfg.objective, *named} <= compare.METRICS.keys()
    measured = named | metrics.keys() & compare.METRICS.keys()
    objectives = find_class(cfg.task._target_).objectives
    assert all(any(name in metric for name in objectives) for metric in measured)


#: One file for each, in a custom folder.
OWN = {
    "dataset": "defaults: [base]\n_target_: sj_taid.data.Digits\nname: own\nchannels: 1\n"
    "classes: 10\nimage_size: 16\nbatch_size: 8\n",
    "neuron": "defaults: [lif]\nv_threshold: 0.7\n",
    "metric": "defaults: [small]\nsamples: 50\n",
    "experiment": "# @package _global_\ndefaults: [digits_small_cpu, override /dataset: own,"
    " override /neuron: own, override /metric: own]\ntrainer: {max_epochs: 2}\n",
}


def test_custom_data_set_neuron_metric_and_recipe_are_a_file_each(tmp_path):
    for group, text in OWN.items():
        (tmp_path / group).mkdir()
        (tmp_path / group / "own.yaml").write_text(text)
    there = f"hydra.searchpath=[file://{tmp_path}]"
    cfg = compose("train", [there, "experiment=own"])
    data = instantiate(cfg.dataset)
    assert (data.name, data.num_workers, cfg.trainer.max_epochs) == ("own", 0, 2)
    model = instantiate(cfg.model)
    assert model.image_size == 16
    assert {node.v_threshold for node in model.modules() if isinstance(node, LIFNode)} == {0.7}
    evaluator = instantiate(cfg.metric)
    assert (evaluator.samples, evaluator.autoencoder["latent_channels"]) == (50, 16)
    assert compose("train", [there, "dataset=own"]).metric.samples == 5000  # grey, by default
    assert "metric" not in compose("train", [there, "dataset=own", "task=classification"])
