"""A run's folder: nothing in it is lost, and nothing in it is called but what is trusted."""

import json
import multiprocessing
import os
import pickle

import pytest
import torch
from omegaconf import OmegaConf
from spikingjelly.activation_based import neuron

from sj_taid._build import build
from sj_taid.training import Run, load_model
from sj_taid.training import run as runs
from sj_taid.training.callbacks import AtomicCheckpointIO
from sj_taid.training.commands import train
from sj_taid.training.composing import compose
from tests.training.conftest import TINY_AUTOENCODING, TINY_CLASSIFICATION


class MyLIF(neuron.LIFNode):
    """A neuron of somebody else's."""


def files(run):
    return [path.name for path in run.checkpoint.parent.iterdir()]


def die_while_writing(path):
    def half(checkpoint, path):
        path.write_bytes(b"half")
        os._exit(9)

    torch.save = half
    AtomicCheckpointIO().save_checkpoint({}, path)


def test_a_kill_leaves_the_checkpoint_before_and_its_rest_goes(tmp_path):
    run = Run(tmp_path)
    AtomicCheckpointIO().save_checkpoint({"epoch": 3}, run.checkpoint)
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=die_while_writing, args=(run.checkpoint,))
    process.start()
    process.join()
    assert process.exitcode == 9 and len(files(run)) == 2
    with run.lock():
        assert files(run) == ["last.ckpt"]
    assert torch.load(run.checkpoint, weights_only=True) == {"epoch": 3}


def test_the_lock_takes_away_what_is_the_runs_own_alone(tmp_path):
    others = [tmp_path / "notes" / ".fad.npz.1.tmp", tmp_path / ".mine.tmp"]
    (tmp_path / ".folder.tmp").mkdir()
    others[0].parent.mkdir()
    left = tmp_path / ".metrics.json.17.tmp"
    for path in (*others, left):
        path.touch()
    with Run(tmp_path).lock():
        assert not left.exists() and all(path.exists() for path in others)


def test_metrics_are_json(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^fad, figures\.fid: not a finite number"):
        Run(tmp_path).save_metrics({"fad": float("nan"), "figures": {"fid": float("inf")}})
    assert not list(tmp_path.iterdir())


def test_what_trains_can_be_loaded(tiny, tmp_path):
    name = f"{__name__}.MyLIF"
    foreign = [*TINY_CLASSIFICATION, "neuron=lif", f"neuron._target_={name}"]
    with pytest.raises(ValueError, match=rf"names '{name}'.*add trust=\[{name}\]"):
        train(tiny(*foreign, tiny=False), tmp_path)
    assert not list(tmp_path.iterdir())

    train(tiny(*foreign, f"trust=[{name}]", tiny=False), tmp_path)
    assert Run(tmp_path).config.trust == [name]
    # What the run says of itself is no reason to trust it.
    with pytest.raises(ValueError, match=rf"add trust=\[{name}\]"):
        load_model(tmp_path)
    assert any(isinstance(module, MyLIF) for module in load_model(tmp_path, [name]).modules())


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("save", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))])
def test_a_hostile_checkpoint_is_called_what_it_is(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.ckpt"
    save({"state_dict": Hostile()}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt is not .* names posix\.system, code") as info:
        runs.read_checkpoint(path)
    assert "weights_only" not in f"{info.value} {info.value.__cause__}"
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize(
    "target",
    [
        "sj_taid.ALIFNode",
        "sj_taid.model.FSVAE",
        "sj_taid.training.generation.Generation",
        "spikingjelly.activation_based.neuron.IFNode",
        "spikingjelly.activation_based.surrogate.ATan",
        "torch.nn.modules.loss.MSELoss",
        "torch.optim.lr_scheduler.CosineAnnealingLR",
    ],
)
def test_public_classes_are_trusted(target):
    build({"a": [{"_target_": target, "_partial_": True}]})


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "sj_taid.swap_neurons",
        "sj_taid.data.event.Path",  # imported there
        "sj_taid.data.base.torch.load",
        "sj_taid.data._Secret",
        "sj_taid.database.Data",
        "torch.optim.nowhere.Adam",
        "torch.optim.lr_scheduler.Counter",
        "torch.load",
        "",
        3,
    ],
)
def test_others_are_not(target):
    with pytest.raises(ValueError, match="no public class of"):
        build({"a": [{"_target_": target, "_partial_": True}]})


def test_nothing_is_resolved_after_the_check(tmp_path):
    path = f"{{_target_: pathlib.Path, _args_: [{tmp_path}/hacked]}}"
    evil = f'\\${{oc.create:"{{_target_: pathlib.Path.touch, self: {path}}}"}}'
    node = OmegaConf.create({"_target_": "sj_taid.TAID", "T": evil})
    with pytest.raises(ValueError, match=r"T must be .* '\$\{oc\.create"):
        runs.build(node)
    assert not (tmp_path / "hacked").exists()


def test_runs_of_before_the_package_load(tiny, tmp_path):
    train(tiny(*TINY_CLASSIFICATION, tiny=False), tmp_path)
    run = Run(tmp_path)
    config, path = run.config, tmp_path / runs.CONFIG
    text = path.read_text().replace(
        "sj_taid.training.classification", "experiments.task.classification"
    )
    text = text.replace("sj_taid.data", "experiments.data").replace(
        "sj_taid.training.callbacks", "experiments.progress"
    )
    assert text.count("_target_: experiments.") == 3
    path.write_text(text + "published:\n  accuracy: 0.99\n")
    assert run.config == config and not run.differences(config)
    load_model(tmp_path)


def test_resuming_keeps_the_data(tiny, tmp_path):
    train(tiny(*TINY_AUTOENCODING, tiny=False), tmp_path / "run")
    other = tiny(
        *TINY_AUTOENCODING, "dataset=mnist", f"resume={tmp_path / 'run'}", tiny=False
    )  # fmt: skip
    message = r"another dataset\._target_ \(sj_taid\.data\.Digits, now sj_taid\.data\.MNIST\)"
    for folder in ("run", "another"):
        with pytest.raises(ValueError, match=message):
            train(other, tmp_path / folder)
    assert json.loads((tmp_path / "run" / runs.METRICS).read_text())["epochs"] == 1
    assert Run(tmp_path / "run").config.dataset.name == "digits"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "optimizer.lr=0.5",
            r"another optimizer\.lr \(0\.001, now 0\.5\); .* same data, task, opt",
        ),
        (
            "trainer.max_epochs=2",
            r"another .*T_max \(1, now 2\), which follows trainer\.max_epochs",
        ),
    ],
)
def test_resuming_keeps_the_optimizer_and_its_schedule(tiny, tmp_path, override, message):
    cosine = "torch.optim.lr_scheduler.CosineAnnealingLR"
    schedule = f"{{_target_: {cosine}, _partial_: true, T_max: '${{trainer.max_epochs}}'}}"
    chosen = [*TINY_AUTOENCODING, f"task.scheduler={schedule}"]
    train(tiny(*chosen, tiny=False), tmp_path)
    with pytest.raises(ValueError, match=message):
        train(tiny(*chosen, override, f"resume={tmp_path}", tiny=False), tmp_path)
    assert Run(tmp_path).config.optimizer.lr == 1e-3


def test_a_run_is_found_by_the_folder_of_its_checkpoints(tiny, tmp_path):
    train(tiny(*TINY_AUTOENCODING, tiny=False), tmp_path)
    assert Run.find(tmp_path / runs.CHECKPOINTS).folder == tmp_path


def test_two_folders_of_images_are_two_sets_of_data():
    roots = ("photos/a", "photos/b", "elsewhere/a/")
    cfgs = [compose("train", ["dataset=image_folder", f"dataset.root={root}"]) for root in roots]
    assert [cfg.dataset.name for cfg in cfgs] == [f"image_folder_{name}" for name in "aba"]
