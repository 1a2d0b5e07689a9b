"""Runs from the configs to the pictures: what is left, resumed, refused."""

import json
import re
import subprocess

import lightning as L
import pytest
import torch
from hydra.errors import ConfigCompositionException, MissingConfigException
from matplotlib import image as mpimg
from omegaconf import OmegaConf

from sj_taid.data import Digits
from sj_taid.training import commands, run
from sj_taid.training.commands import train
from sj_taid.training.composing import compose, instantiate
from sj_taid.training.generation import Generation
from tests.training.conftest import (
    CONF,
    TINY,
    TINY_AUTOENCODING,
    TINY_VAE,
    exit_code,
    script,
)

PICTURES = (
    "samples.png",
    "reconstructions.png",
    "parameters.png",
    "attention.png",
    "curves.png",
    "spectra.png",
)


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def test_a_run_from_the_command_line_leaves_everything_and_can_be_sampled(tmp_path, cache):
    folder = tmp_path / "run"
    command = script(
        "train.py", *TINY, "pictures=true", f"hydra.run.dir={folder}", f"cache_dir={cache}"
    )
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr  # nobody else's notes either
    assert done.stdout.rstrip().splitlines()[-1].endswith(f"pictures: {folder}")

    for name in PICTURES:
        assert mpimg.imread(folder / name).std() > 0, name
    metrics = json.loads((folder / run.METRICS).read_text())
    assert metrics["fad"] > 0 and metrics["fad_untrained"] > 0 and metrics["reconstruction"] > 0
    assert metrics["epochs"] == 1 and metrics["command"].startswith("sj-taid train")
    assert OmegaConf.load(folder / run.CONFIG).model.neuron.init_tau == pytest.approx(4 / 3)
    assert list((folder / "tensorboard").glob("events*"))

    again = subprocess.run(
        script("sample.py", f"checkpoint={folder}", "n=6", "seed=3"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert again.returncode == 0, again.stderr
    assert mpimg.imread(folder / "samples-seed3.png").std() > 0
    assert not list(tmp_path.glob("outputs")) and not list(tmp_path.glob("*.log"))


@pytest.mark.parametrize("override", ["n=0", "n=abc", "columns=0"])
def test_nothing_to_draw(override):
    cfg = compose("sample", ["checkpoint=nowhere", override])
    name, _, value = override.partition("=")
    with pytest.raises(ValueError, match=rf"{name} must be a whole number from 1, .* '?{value}'?$"):
        commands.sample(cfg)


def test_a_picture_has_a_name(tmp_path):
    with pytest.raises(ValueError, match=r"output must name a picture, but .* is a folder"):
        commands.sample(compose("sample", ["checkpoint=nowhere", f"output={tmp_path}"]))


@pytest.mark.parametrize(
    ("task", "lacks"),
    [
        ("generation model=classifier_small", "Classifier lacks training_loss, sample"),
        ("generation model=autoencoder", "Autoencoder lacks sample"),
        ("autoencoding model=classifier_small", "Classifier lacks training_loss"),
        ("classification model=esvae_small", "ESVAE lacks classes"),
    ],
)
def test_a_task_refuses_a_model_of_another(tmp_path, task, lacks):
    with pytest.raises(Exception, match=rf"but {lacks}; choose another task=, or another model="):
        train(compose("train", f"task={task}".split()), tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("choice", ["loss=tet", "loss=mse", "neuron=alif_channel"])
def test_what_is_for_classifiers_is_refused_elsewhere(tiny, tmp_path, choice):
    with pytest.raises(ValueError, match=r"is for a classifier; add task=classification"):
        train(tiny(choice), tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_scheduler_as_the_documentation_gives_it(tiny, tmp_path):
    documented = (CONF.parent / "docs" / "experiments.md").read_text()
    (override,) = re.findall(r"`'(task\.scheduler=.*?)'`", documented)
    train(tiny(override.replace("step_size: 5", "step_size: 1"), "trainer.max_epochs=2"), tmp_path)
    (state,) = run.read_checkpoint(run.Run(tmp_path).checkpoint)["lr_schedulers"]
    assert state["_last_lr"] == [pytest.approx(1e-5)]


@pytest.mark.parametrize("decoder", options("decoder"))
@pytest.mark.parametrize("neuron", sorted({*options("neuron")} - {"alif_channel"}))
def test_every_neuron_with_every_decoder(tiny, tmp_path, neuron, decoder):
    choices = [f"neuron={neuron}", f"decoder={decoder}", "pictures=true"]
    metrics = train(tiny(*choices, "trainer.limit_train_batches=1"), tmp_path)
    assert metrics["fad"] > 0
    for name in PICTURES:
        assert (tmp_path / name).is_file()


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.latent_loss=kl"],
        ["model.presampling=prefix"],
        ["surrogate=atan", "neuron.min_v_threshold=0.05"],
        ["neuron.learn_tau=false", "trainer.precision=bf16-mixed"],
    ],
    ids=str,
)
def test_options(tiny, tmp_path, overrides):
    assert train(tiny(*overrides), tmp_path)["reconstruction"] > 0


@pytest.mark.parametrize(
    ("overrides", "pictures"),
    [
        (TINY_VAE, {"samples.png", "reconstructions.png", "curves.png", "spectra.png"}),
        (TINY_AUTOENCODING, {"reconstructions.png", "curves.png"}),
    ],
    ids=["vae", "autoencoder"],
)
def test_plain_models(tiny, tmp_path, overrides, pictures):
    metrics = train(tiny(*overrides, "pictures=true", tiny=False), tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
    assert metrics["reconstruction"] > 0 and ("fad" in metrics) == ("samples.png" in pictures)
    assert metrics["protocol"].keys() == metrics.keys() & {"reconstruction", "fad"}
    model = run.load_model(tmp_path / run.CHECKPOINTS / "last.ckpt")
    assert model(torch.zeros(2, 1, 8, 8)).image.shape == (2, 1, 8, 8)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("name", options("model"))
def test_every_model_composes(tiny, name, size):
    cfg = tiny(f"model={name}", f"dataset.image_size={size}", tiny=False)
    model = instantiate(cfg.model)
    assert model.image_size == size


def test_the_originals_neuron_is_where_fsvae_starts(tiny):
    cfg = tiny(tiny=False)
    assert cfg.neuron.init_tau == pytest.approx(4 / 3) and cfg.neuron.v_threshold == 0.2
    assert cfg.neuron.v_reset == 0.0
    assert not cfg.neuron.decay_input and not cfg.neuron.detach_reset
    assert cfg.neuron.surrogate_function._target_.endswith("PiecewiseLeakyReLU")


def test_data_is_fetched_before_it_is_read(tiny, tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(Digits, "prepare_data", lambda self: order.append("prepared"))
    load = Digits.load
    monkeypatch.setattr(Digits, "load", lambda self: order.append("loaded") or load(self))
    train(tiny(), tmp_path)
    assert order[:2] == ["prepared", "loaded"] and order.count("loaded") == 1


def test_the_same_seed_gives_the_same_figures(tiny, tmp_path):
    first = train(tiny(), tmp_path / "a")
    second = train(tiny(), tmp_path / "b")
    other = train(tiny("seed=1"), tmp_path / "c")
    for key in ("fad", "fad_untrained", "reconstruction"):
        assert first[key] == second[key]
        assert first[key] != other[key]


class Stop(L.Callback):
    """Ends a long run in its third epoch."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 2 and trainer.max_epochs == 500:
            raise SystemExit("stopped")


def test_a_half_done_run_goes_on_in_its_folder_with_its_choices(
    tiny, sj_taid, tmp_path, cache, capsys, monkeypatch
):
    start = ["neuron=lif", "neuron_start.calibrate=0.1", "neuron_start.v_threshold=4.0"]
    whole = train(tiny(*start), tmp_path / "whole")
    place = tmp_path / "sweep"
    place.mkdir()
    monkeypatch.chdir(place)
    there = run.Run(place / "neuron=lif,seed=0")  # as a sweep names it
    with pytest.raises(SystemExit, match="stopped"):
        sj_taid(
            "train", *TINY, *start, "trainer.max_epochs=500", f"cache_dir={cache}",
            f"hydra.run.dir='{there.folder}'", f"+callbacks.stop._target_={__name__}.Stop",
        )  # fmt: skip
    half = torch.load(there.checkpoint, weights_only=True)
    assert half["epoch"] == 1 and not (there.folder / run.METRICS).exists()

    again = ["train", f"resume={there.folder}"]
    assert exit_code(*again, "trainer.max_epochs=4") == 0
    metrics = there.metrics
    assert metrics["fad_untrained"] == whole["fad_untrained"]
    assert metrics["epochs"] == 4 and metrics["choices"]["neuron"] == "lif"
    assert metrics["command"].count("trainer.max_epochs") == 1
    assert metrics["training_seconds"] > half["callbacks"]["Timer"]["time_elapsed"]["train"]
    resumed = torch.load(there.checkpoint, weights_only=True)
    pictures, before = (kept["callbacks"]["Pictures"] for kept in (resumed, half))
    assert len(pictures["history"]) == 5 and len(pictures["epochs"]) == 4
    assert pictures["epochs"][:2] == before["epochs"] and resumed["global_step"] == 2 * 4
    assert [path.name for path in place.iterdir()] == [there.folder.name]

    capsys.readouterr()
    sj_taid(*again)
    assert "finished already" in capsys.readouterr().out and there.metrics == metrics


def test_resuming_needs_a_checkpoint(tiny, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.ckpt"):
        train(tiny(f"resume={tmp_path / 'gone.ckpt'}"), tmp_path / "run")


def test_resuming_from_a_damaged_checkpoint(tiny, tmp_path, monkeypatch):
    checkpoint = tmp_path / run.CHECKPOINTS / "last.ckpt"
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"PK half a checkpoint")
    monkeypatch.setattr(Generation, "before_training", None)  # not so far
    with pytest.raises(ValueError, match=r"(?s)last\.ckpt is not a whole checkpoint.*train anew"):
        train(tiny(), tmp_path)


def test_recordings_are_for_classifiers(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"dataset=nmnist holds recordings.*task=classification"):
        train(tiny("dataset=nmnist", tiny=False), tmp_path)


def test_a_checkpoint_gives_the_trained_model(tiny, tmp_path):
    train(tiny(), tmp_path)
    checkpoint = tmp_path / run.CHECKPOINTS / "last.ckpt"
    model = run.load_model(checkpoint)
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert not model.training
    assert all(torch.equal(v, saved[f"model.{k}"]) for k, v in model.state_dict().items())

    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*gone\.ckpt"):
        run.load_model(tmp_path / "gone.ckpt")

    whole = checkpoint.read_bytes()
    for damage in (whole[: len(whole) // 2], b"not a checkpoint", b""):
        checkpoint.write_bytes(damage)
        with pytest.raises(ValueError, match="not a whole checkpoint") as info:
            run.load_model(checkpoint)
        assert info.value.__cause__ is not None

    checkpoint.write_bytes(whole)
    config = tmp_path / run.CONFIG
    text = config.read_text()
    config.write_text(text.replace("T: 3", "T: 4"))  # as if it were of another model
    with pytest.raises(ValueError, match=r"(?s)not a checkpoint of this run's model .* leave out"):
        run.load_model(checkpoint)
    config.write_text(text.replace("sj_taid.TAID", "os.system"))
    with pytest.raises(ValueError, match=r"names 'os\.system'.*trusted source"):
        run.load_model(checkpoint)
    # Neither what a trusted module imports nor what stands outside the model's config passes.
    foreign = f"{{_target_: pathlib.Path.touch, self: {tmp_path / 'touched'}}}"
    for evil in (
        text.replace("sj_taid.TAID", "sj_taid.ops.alif.kernels.Path.touch"),
        text.replace("\n  image_decoder:\n", "\n  image_decoder: ${evil}\n  ignored:\n")
        + f"evil: {foreign}\n",
    ):
        assert evil != text
        config.write_text(evil)
        with pytest.raises(ValueError, match="trusted source"):
            run.load_model(checkpoint)
    assert not (tmp_path / "touched").exists()
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"no config\.yaml at"):
        run.load_model(checkpoint)


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("neuron=izhikevich", MissingConfigException, r"(?s)izhikevich.*alif.*lif.*plif"),
        ("dataset=imagenet", MissingConfigException, r"(?s)imagenet.*digits.*mnist"),
        ("metric=typo", MissingConfigException, r"(?s)typo.*colour.*grey.*small"),
        ("trainer.max_epoch=3", ConfigCompositionException, "max_epoch"),
    ],
)
def test_unknown_choices_and_keys_list_what_there_is(tiny, override, error, message):
    with pytest.raises(error) as info:
        tiny(override)
    import re

    assert re.search(message, str(info.value) + str(info.value.__cause__))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("decoder.squeeze=time", "squeeze must be 'spatial', 'all' or 'pixel'"),
        ("neuron.backend=fpga", "'fpga' is unknown"),
        ("trainer.max_epochs=abc", "max_epochs must be a whole number from 0, but it is 'abc'"),
        ("trainer.max_epochs=-1", "max_epochs must be a whole number from 0, but it is -1"),
        ("seed=abc", "seed must be a whole number from 0, but it is 'abc'"),
        (
            "model.image_decoder=taid",
            "it is 'taid'; on the command line choose it with decoder=NAME",
        ),
        ("model.neuron=lif", "it is 'lif'; on the command line choose it with neuron=NAME"),
        ("neuron.init_tau=1.0", "init_tau must be a number of time steps greater than 1"),
        ("model.latent_loss=l1", "latent_loss must be one of mmd, kl"),
        ("model.presampling=fast", "presampling must be one of"),
        ("dataset.image_size=9", "cannot be halved"),
    ],
)
def test_bad_values_name_what_is_expected(tiny, tmp_path, override, message):
    with pytest.raises(Exception, match=message):
        train(tiny(override), tmp_path)
