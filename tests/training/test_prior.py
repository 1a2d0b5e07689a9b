"""ESVAE's priors in a run: fitted at the end of training, measured and sampled."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.optim import Adam

from sj_taid.data import Samples
from sj_taid.model import ESVAE, FSVAE, flow
from sj_taid.training import plot, sample
from sj_taid.training.config import compose
from sj_taid.training.generation import ENOUGH_OF_A_CLASS, Generation
from sj_taid.training.parts import build_parts
from sj_taid.training.run import Run, load_model
from tests.training.conftest import TINY_ESVAE, fit, stopped_in

SMALL = {"image_size": 8, "T": 2, "hidden_channels": 4, "latent_channels": 3}
ADAM = partial(Adam, lr=1e-3)


@pytest.fixture(scope="module", autouse=True)
def short_fits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "STEPS", 10)
        yield


@pytest.fixture(scope="module")
def finished(trained):
    return trained(*TINY_ESVAE, "pictures=true")


def test_train_fits_the_flow_and_measures_both_priors(finished):
    assert load_model(finished).flow.fitted
    metrics = Run(finished).metrics
    assert metrics["prior"] == "flow" and metrics["fad"] > 0 and metrics["fad_learned"] > 0
    assert metrics["fad"] != metrics["fad_learned"]
    assert metrics["protocol"]["fad_learned"].endswith("the prior learned")
    assert (finished / "attention.png").is_file()
    assert load_model(finished).labels == [*range(10)]


def test_train_without_a_flow(tmp_path, finished):
    metrics = fit(tmp_path, *TINY_ESVAE, "model.sample_from=learned")
    other = Run(finished).metrics
    assert metrics["prior"] == "learned" and "fad_learned" not in metrics
    assert metrics["parameters"] < other["parameters"]  # the flow's too
    assert metrics["fad"] == other["fad_learned"]


def test_train_needs_enough_images_for_the_prior(tmp_path):
    with pytest.raises(ValueError, match="a flow needs the rates of at least 10 images, but got 8"):
        fit(tmp_path, *TINY_ESVAE, "dataset.limit=8")
    assert not (tmp_path / "checkpoints").exists()


def test_sample_from_either_prior_of_esvae(folder, monkeypatch):
    drawn = set()
    for prior in ("learned", "flow"):
        sample.main(compose("sample", [f"checkpoint={folder}", "n=4", f"sample_from={prior}"]))
        drawn.add((folder / f"samples-{prior}-seed0.png").read_bytes())
    assert len(drawn) == 2
    monkeypatch.setattr(Run, "model", lambda *_: FSVAE(**SMALL))
    with pytest.raises(ValueError, match=r"sample_from is for model=esvae, but this is a FSVAE"):
        sample.main(compose("sample", [f"checkpoint={folder}", "sample_from=learned"]))


def test_sample_of_classes(folder, monkeypatch):
    drawn = []
    for module in (plot, sample):
        record = lambda images, path, *how: drawn.append((path.name, len(images), *how))  # noqa: E731
        monkeypatch.setattr(module, "draw_grid", record)

    def main(*choices):
        sample.main(compose("sample", [f"checkpoint={folder}", "columns=2", "n=6", *choices]))

    for label in ("7", "all", "[3,5]"):
        main(f"label={label}")
    every = [str(label) for label in range(10)]
    assert drawn == [
        ("samples-label7-seed0.png", 6, 2),
        ("samples-labelall-seed0.png", 20, 2, every),
        ("samples-label3-5-seed0.png", 4, 2, ["3", "5"]),
    ]
    for label in ("12", "[]", "[all]"):
        with pytest.raises(ValueError, match=r"label must be one of .*9, a list of them, or all"):
            main(f"label={label}")
    for label in ("all", "3"):
        with pytest.raises(ValueError, match=r"label must be one of \[\]"):
            main(f"label={label}", "sample_from=learned")


def test_sample_neighbours(folder, monkeypatch):
    """Below each sample is the training image that a plain search finds, mirrored or not."""
    drawn = []
    monkeypatch.setattr(sample, "draw_pairs", lambda *how: drawn.append(how))
    monkeypatch.setattr(sample, "draw_grid", lambda *how: drawn.append(how))
    for choices in ([], ["neighbours=true"], ["neighbours=true", "label=3"]):
        sample.main(compose("sample", [f"checkpoint={folder}", "columns=5", "n=7", *choices]))
    (plain, *_), (samples, nearest, path, columns, _), (*_, of_label, _, _) = drawn
    assert torch.equal(samples, plain) and columns == 5
    assert [path.name, of_label.name] == [
        "samples-neighbours-seed0.png",
        "samples-label3-neighbours-seed0.png",
    ]
    data = build_parts(Run(folder).config).load_data()
    images = torch.cat([image for image, _ in data.loader(data.train_set)])
    for one, found in zip(samples, nearest, strict=True):
        errors = (images - one).square().mean((1, 2, 3))
        torch.testing.assert_close((found - one).square().mean(), errors.min())
        assert (images == found).flatten(1).all(1).any()
    # Of a training image it is the image itself, as training may have mirrored it.
    for mirrored in (False, True):
        data.augment = "flip" if mirrored else None
        asked = images[3:6].flip(-1) if mirrored else images[3:6]
        found, away = sample.find_nearest(asked, data)
        assert torch.equal(found, asked) and away.eq(0).all()
    with pytest.raises(ValueError, match=r"neighbours=true is for samples of one label"):
        sample.main(compose("sample", [f"checkpoint={folder}", "label=all", "neighbours=true"]))


@pytest.mark.parametrize(
    ("labels", "given"), [([0, 1] * 5, True), ([-1] * 10, False), ([*range(31)], False)]
)
def test_generation_fits_the_flow_to_labels_of_2_to_30_classes(labels, given, monkeypatch):
    task, fitted = Generation(ESVAE(**SMALL, sample_from="flow"), ADAM), []
    monkeypatch.setattr(task.model, "fit_prior", lambda images, *how: fitted.append(how))
    data = SimpleNamespace(labels=labels)
    task.fit_prior(SimpleNamespace(mirrors=True, train_set=data, loader=lambda _: []))
    assert fitted == [(labels if given else None, True)]


@pytest.mark.parametrize(
    ("source", "labels", "warned"),
    [
        ("flow", [0, 1] * ENOUGH_OF_A_CLASS, False),
        ("flow", [0, 1] * ENOUGH_OF_A_CLASS + [2] * (ENOUGH_OF_A_CLASS - 1), True),
        ("flow", [-1] * 20, False),
        ("learned", [0, 1], False),
    ],
)
def test_generation_warns_of_few_images_of_a_class(source, labels, warned, caplog):
    samples = Samples(torch.zeros(len(labels), 1), labels)
    data = SimpleNamespace(train_set=samples, validation_set=None)
    Generation(ESVAE(**SMALL, sample_from=source), ADAM).before_training(data, None)
    assert (f"A class has {ENOUGH_OF_A_CLASS - 1} training images" in caplog.text) == warned


@pytest.mark.parametrize(("lr_scale", "expected"), [(3, [1e-3, 3e-3, 1e-2]), (None, [1e-3, 1e-2])])
def test_generation_prior_lr_scale(lr_scale, expected):
    model = ESVAE(**SMALL)
    groups = Generation(model, ADAM, lr_scale, prior_lr_scale=10).parameter_groups()
    assert [group.get("lr", 1e-3) for group in groups] == expected
    assert {*groups[-1]["params"]} == {*model.prior.parameters()}
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])
    with pytest.raises(ValueError, match=r"prior_lr_scale is for model=esvae, not FSVAE; leave it"):
        Generation(FSVAE(**SMALL), ADAM, prior_lr_scale=10)


@pytest.mark.slow
def test_resumed_run_fits_the_flow_that_a_kill_prevented(tmp_path, monkeypatch, finished):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Generation, "fit_prior", lambda *_: 1 / 0)  # as a kill after the training
        fit(tmp_path, *TINY_ESVAE)
    assert not load_model(tmp_path).flow.fitted
    metrics = fit(tmp_path, *TINY_ESVAE)
    assert metrics["fad"] == Run(finished).metrics["fad"]
    assert load_model(tmp_path).flow.fitted


@pytest.mark.slow
def test_train_fits_the_flow_to_averaged_weights(tmp_path):
    average = "lightning.pytorch.callbacks.EMAWeightAveraging"
    averaged = [f"+callbacks.ema._target_={average}", "+callbacks.ema.decay=1"]
    short = ["trainer.limit_train_batches=3", "trainer.max_epochs=2"]
    job = [*TINY_ESVAE, *averaged, *short, "optimizer.lr=1"]
    metrics = fit(tmp_path, *job)
    assert metrics["fad"] > 0
    assert load_model(tmp_path).flow.cumulative.unique().numel() > 2

    # Killed before its metrics it has no epoch left, and measures the averaged weights still.
    (tmp_path / "metrics.json").unlink()
    assert fit(tmp_path, *job)["fad"] == metrics["fad"]


def weight_of(folder):
    return load_model(folder).flow.velocity.last.weight


@pytest.mark.slow
def test_resumed_finished_run_is_unfinished_until_it_ends(folder, sj_taid):
    there = Run(folder)
    shorter, config, weight = there.metrics, there.config, weight_of(folder)
    longer = ["train", f"resume={folder}", "trainer.max_epochs=4"]
    with pytest.raises(SystemExit, match=r"without dataset\.validation=; leave it out"):
        sj_taid(*longer, "dataset.validation=0.5")
    assert there.metrics == shorter and there.config == config

    with stopped_in(2), pytest.raises(SystemExit, match="Stopped"):
        sj_taid(*longer)
    assert not there.is_finished and there.config.trainer.max_epochs == 4
    assert not load_model(folder).flow.fitted  # that of the first epoch's encoder
    sj_taid(*longer, "trainer.max_epochs=3")
    assert there.metrics["epochs"] == 3
    assert not torch.equal(weight_of(folder), weight)
