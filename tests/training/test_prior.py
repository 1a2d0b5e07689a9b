"""ESVAE's priors in a run: fitted at the end of training or later, measured and sampled."""

from functools import partial

import lightning as L
import pytest
import torch
from torch.optim import Adam

from sj_taid.model import ESVAE, VAE
from sj_taid.training import fit_prior, sample
from sj_taid.training.config import compose
from sj_taid.training.evaluate import evaluate
from sj_taid.training.generation import Generation
from sj_taid.training.run import Run, load_model
from sj_taid.training.train import train
from tests.training.conftest import TINY, TINY_VAE

# Trained so far that the images depend on the latent.
TINY_ESVAE = [
    "model=esvae",
    "model.components=2",
    *(o for o in TINY[1:] if ".k=" not in o),
    "dataset.batch_size=64",
    "trainer.limit_train_batches=22",
    "optimizer.lr=1e-2",
]
SMALL = {"image_size": 8, "T": 2, "hidden_channels": (4, 8), "latent_channels": 3}
ADAM = partial(Adam, lr=1e-3)


@pytest.fixture(scope="module")
def finished(trained):
    return trained(*TINY_ESVAE, "pictures=true")


def test_train_fits_the_mixture_and_measures_both_priors(finished):
    model = load_model(finished)
    assert model.mixture.fitted
    metrics = Run(finished).metrics
    assert metrics["fad"] > 0 and metrics["fad_mixture"] > 0
    assert metrics["fad"] != metrics["fad_mixture"]
    assert metrics["protocol"]["fad_mixture"].endswith("the prior mixture")
    assert (finished / "attention.png").is_file()


def test_train_measures_the_models_own_prior_first(tiny, tmp_path, finished):
    cfg = tiny(*TINY_ESVAE, "model.sample_from=mixture", tiny=False)
    metrics = train(cfg, tmp_path, command="")
    first = Run(finished).metrics
    assert metrics["fad"] == first["fad_mixture"]
    assert metrics["fad_learned"] == first["fad"]
    assert metrics["fad_untrained"] == first["fad_untrained"]


@pytest.mark.parametrize(
    ("values", "note"),
    [
        ({"fad": 123.0, "fad_untrained": 147.0}, True),
        ({"fad": 12.0, "fad_learned": 123.0, "fad_untrained": 147.0}, True),
        ({"fad": 12.0, "fad_learned": 40.0, "fad_untrained": 147.0}, False),
        ({"fad": 123.0}, False),
    ],
)
def test_generation_report_notes_a_learned_prior_near_untrained(values, note):
    lines = Generation(ESVAE(**SMALL), ADAM).report(values | {"reconstruction": 0.1})
    said = "The learned prior is near untrained: FAD 123.000, 147.000 before training;"
    assert any(line.startswith(said) for line in lines) == note


@pytest.mark.slow
def test_fit_prior_command(folder, finished, sj_taid):
    before = torch.load(Run(folder).checkpoint, weights_only=True)
    sj_taid("fit_prior", f"checkpoint={folder}", "components=3", "iterations=9")
    after = torch.load(Run(folder).checkpoint, weights_only=True)
    assert after.keys() == before.keys()
    for name, tensor in after["state_dict"].items():
        if "mixture" in name:
            assert tensor.isfinite().all(), name
        else:
            assert torch.equal(tensor, before["state_dict"][name]), name
    assert len(load_model(folder).mixture.means) == 3
    assert Run(folder).config.model.components == 3
    later = ["model.components=3", "model.iterations=9"]
    assert Run(folder).metrics["overrides"] == later
    assert Run(folder).metrics["command"].split(" ", 2) == ["sj-taid", "train", " ".join(later)]
    evaluated = evaluate(compose("evaluate", [f"checkpoint={folder}"]))["metrics"]
    fitted, metrics = Run(finished).metrics, Run(folder).metrics
    assert evaluated["fad"] == metrics["fad"] == fitted["fad"]
    assert evaluated["fad_mixture"] != fitted["fad_mixture"]
    # What was measured of the mixture before would be taken for this one's.
    assert fitted.keys() - metrics.keys() == {"fad_mixture"}
    assert "fad_mixture" not in metrics["protocol"]
    (evaluation,) = Run(folder).evaluations
    assert evaluation["metrics"] == evaluated

    drawn = []
    for prior in ("learned", "mixture"):
        sj_taid("sample", f"checkpoint={folder}", "n=4", f"sample_from={prior}")
        drawn.append((folder / f"samples-{prior}-seed0.png").read_bytes())
    assert drawn[0] != drawn[1]


@pytest.mark.slow
def test_resumed_run_fits_the_mixture_again(folder, tiny):
    before = load_model(folder).mixture.means
    cfg = tiny(*TINY_ESVAE, "trainer.max_epochs=2", tiny=False)
    train(cfg, folder, command="")
    assert not torch.equal(load_model(folder).mixture.means, before)


def test_fit_prior_takes_out_the_metrics_of_the_mixture_before(tiny, tmp_path):
    train(tiny(*TINY_ESVAE, "model.sample_from=mixture", tiny=False), tmp_path, command="")
    before = Run(tmp_path).metrics
    fit_prior.main(compose("fit_prior", [f"checkpoint={tmp_path}"]))
    assert before.keys() - Run(tmp_path).metrics.keys() == {"fad"}


@pytest.mark.parametrize(("lr_scale", "expected"), [(3, [1e-3, 3e-3, 1e-2]), (None, [1e-3, 1e-2])])
def test_generation_prior_lr_scale(lr_scale, expected):
    model = ESVAE(**SMALL)
    groups = Generation(model, ADAM, lr_scale, prior_lr_scale=10).parameter_groups()
    assert [group.get("lr", 1e-3) for group in groups] == expected
    assert {*groups[-1]["params"]} == {*model.prior.parameters()}
    assert sum(len(group["params"]) for group in groups) == len([*model.parameters()])


@pytest.mark.parametrize(
    ("model", "optimizer", "scale", "message"),
    [
        (VAE(1, 8, 4, 3), ADAM, 10, r"prior_lr_scale=10 is for ESVAE.* is VAE; .*=esvae"),
        (ESVAE(**SMALL), ADAM, -1, "prior_lr_scale must be >= 0, but it is -1"),
        (ESVAE(**SMALL), partial(Adam), 2, r"the optimizer has no lr, .*prior_lr_scale.* give"),
    ],
)
def test_generation_bad_prior_lr_scale(model, optimizer, scale, message):
    with pytest.raises(ValueError, match=message):
        Generation(model, optimizer, prior_lr_scale=scale).parameter_groups()


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_train_refuses_weights_of_another_precision(tiny, tmp_path, precision):
    cfg = tiny(*TINY_VAE, f"trainer.precision={precision}", tiny=False)
    with pytest.raises(ValueError, match=rf"{precision} has no 32-bit .*=bf16-mixed"):
        train(cfg, tmp_path, command="")


EARLY = "lightning.pytorch.callbacks.EarlyStopping"
EARLY = f"{{_target_: {EARLY}, monitor: val/reconstruction, patience: 0, stopping_threshold: 1e9}}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "epochs"),
    [
        (["+trainer.max_steps=3"], 1),
        (["trainer.max_epochs=0"], 0),
        (["trainer.max_epochs=3", f"+callbacks.early={EARLY}"], 1),
    ],
)
def test_train_fits_the_mixture_however_it_ends(tiny, tmp_path, options, epochs):
    cfg = tiny(*TINY_ESVAE, "model.sample_from=mixture", *options, tiny=False)
    metrics = train(cfg, tmp_path, command="")
    assert metrics["epochs"] == epochs and metrics["fad"] > 0
    assert not epochs or load_model(tmp_path).mixture.fitted


@pytest.mark.slow
def test_resumed_run_fits_the_mixture_that_a_kill_prevented(tiny, tmp_path, monkeypatch, finished):
    cfg = tiny(*TINY_ESVAE, tiny=False)
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Generation, "fit_prior", lambda *_: 1 / 0)  # as a kill after the training
        train(cfg, tmp_path)
    assert not load_model(tmp_path).mixture.fitted
    metrics = train(cfg, tmp_path)
    assert metrics["fad_mixture"] == Run(finished).metrics["fad_mixture"]
    assert load_model(tmp_path).mixture.fitted


@pytest.mark.slow
def test_train_fits_the_mixture_to_averaged_weights(tiny, tmp_path):
    average = "lightning.pytorch.callbacks.EMAWeightAveraging"
    averaged = [f"+callbacks.ema._target_={average}", "+callbacks.ema.decay=1"]
    chosen = [*TINY_ESVAE, *averaged, "optimizer.lr=1", "model.sample_from=mixture"]
    metrics = train(tiny(*chosen, "trainer.max_epochs=2", tiny=False), tmp_path)
    assert metrics["fad"] > 0
    within = load_model(tmp_path).mixture.cumulative.clone()
    assert within.unique().numel() > 2

    # Killed before its metrics it has no epoch left, and measures the averaged weights still.
    (tmp_path / "metrics.json").unlink()
    again = train(tiny(*chosen, "trainer.max_epochs=2", tiny=False), tmp_path)
    assert again["fad"] == metrics["fad"]

    # Fitted later it is the same, and a run resumes with another number of components too.
    fit_prior.main(compose("fit_prior", [f"checkpoint={tmp_path}"]))
    assert torch.equal(load_model(tmp_path).mixture.cumulative, within)
    fit_prior.main(compose("fit_prior", [f"checkpoint={tmp_path}", "components=3"]))
    longer = tiny(*chosen, "model.components=3", "trainer.max_epochs=3", tiny=False)
    assert train(longer, tmp_path)["epochs"] == 3


class Stop(L.Callback):
    """Ends a run of four epochs in its third."""

    def on_train_epoch_start(self, trainer, task):
        if trainer.max_epochs == 4 and trainer.current_epoch == 2:
            raise SystemExit("stopped")


@pytest.mark.slow
def test_resumed_finished_run_is_unfinished_until_it_ends(folder, cache, sj_taid):
    there = Run(folder)
    shorter, config = there.metrics, there.config
    there.save_config(config, [*TINY_ESVAE, f"cache_dir={cache}"])  # as the command line does
    longer = ["train", f"resume={folder}", "trainer.max_epochs=4"]
    with pytest.raises(SystemExit, match=r"dataset\.validation \(None, now 0\.5\)"):
        sj_taid(*longer, "dataset.validation=0.5")
    assert there.metrics == shorter and there.config == config

    with pytest.raises(SystemExit, match="Stopped"):
        sj_taid(*longer, f"+callbacks.stop._target_={__name__}.Stop")
    assert not there.is_finished and there.config.trainer.max_epochs == 4
    assert not load_model(folder).mixture.fitted  # that of the first epoch's encoder
    sj_taid(*longer[:-1], "trainer.max_epochs=3")
    assert there.metrics["epochs"] == 3 and load_model(folder).mixture.fitted


def test_train_refuses_weights_averaged_after_the_last_checkpoint(tiny, tmp_path):
    swa = "+callbacks.swa._target_=lightning.pytorch.callbacks.StochasticWeightAveraging"
    with pytest.raises(
        ValueError, match=r"other weights than the saved ones .* take WeightAveraging"
    ):
        train(tiny(*TINY_ESVAE, swa, "+callbacks.swa.swa_lrs=0.1", tiny=False), tmp_path)
    assert not any(tmp_path.iterdir())


def test_fit_prior_keeps_the_runs_settings_and_overrides(folder):
    there = Run(folder)
    there.save_metrics(there.metrics | {"overrides": ["decoder=taid", "seed=1"]})
    fit_prior.main(compose("fit_prior", [f"checkpoint={folder}", "iterations=7"]))
    fit_prior.main(compose("fit_prior", [f"checkpoint={folder}"]))
    assert (there.config.model.components, there.config.model.iterations) == (2, 7)
    assert load_model(folder).mixture.iterations == 7
    assert there.metrics["overrides"] == ["decoder=taid", "seed=1", "model.iterations=7"]
    assert there.metrics["command"] == "sj-taid train decoder=taid seed=1 model.iterations=7"


def test_fit_prior_refuses_more_components_than_images(folder):
    cfg = compose("fit_prior", [f"checkpoint={folder}", "components=5000"])
    with pytest.raises(ValueError, match=r"5000 components needs at least as many rates"):
        fit_prior.main(cfg)


def test_fit_prior_refuses_another_model(tiny, tmp_path):
    train(tiny(), tmp_path, command="")
    with pytest.raises(ValueError, match=r"holds a FSVAE.*model=esvae"):
        fit_prior.main(compose("fit_prior", [f"checkpoint={tmp_path}"]))
    with pytest.raises(ValueError, match=r"holds a FSVAE.*model=esvae"):
        sample.main(compose("sample", [f"checkpoint={tmp_path}", "sample_from=learned"]))
