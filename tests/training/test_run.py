"""A run's folder: what is locked, saved, refused, and called when it is loaded."""

import logging
import os

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf
from spikingjelly.activation_based import neuron

from sj_taid._internal.build import build
from sj_taid.nets.modules import AcceleratedNorm
from sj_taid.training import Run, files, load_model
from sj_taid.training import run as runs
from sj_taid.training.checkpoint import read_checkpoint
from sj_taid.training.config import Folders, compose
from sj_taid.training.files import _LogFile, atomic_write
from sj_taid.training.parts import build_parts
from tests.training.conftest import TINY_CLASSIFICATION, fit, write_images


class MyLIF(neuron.LIFNode):
    """A custom neuron."""


MINE = f"{__name__}.MyLIF"
FOREIGN = [*TINY_CLASSIFICATION, "neuron=lif", f"neuron._target_={MINE}"]


def plain(cfg):
    """A config's values."""
    return OmegaConf.to_container(cfg, resolve=True)


@pytest.mark.parametrize(
    ("made", "before", "within", "left"),
    [
        ("runs", None, "train.log", ""),  # a folder of its own, and those above it
        ("runs/a", None, "train.log", "runs"),
        (None, None, "train.log", "runs runs/a"),
        ("runs", "train.log", "train.log", "runs runs/a runs/a/train.log"),
        ("runs", "notes.txt", "train.log", "runs runs/a runs/a/notes.txt runs/a/train.log"),
        ("runs", None, "config.yaml", "runs runs/a runs/a/config.yaml"),
    ],
)
def test_lock_removes_what_a_refusal_leaves_alone(
    tmp_path, monkeypatch, made, before, within, left
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Folders, "made", made and tmp_path / made)
    folder = tmp_path / "runs" / "a"
    if before:
        folder.mkdir(parents=True)
        (folder / before).write_text("mine")
    with pytest.raises(ValueError, match="refused"), Run("runs/a").lock():
        (folder / within).touch()
        raise ValueError("refused")
    paths = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
    assert {*paths} - {"runs/a/.lock"} == {*left.split()}


def test_lock_admits_one_process_at_a_time(tmp_path, monkeypatch):
    with Run(tmp_path / "run").lock():
        message = "another command runs in .*run; wait for it"
        with pytest.raises(ValueError, match=message), Run(tmp_path / "run").lock():
            pytest.fail("held twice")
        with Run(tmp_path / "other").lock():
            pass
        monkeypatch.setattr(rank_zero_only, "rank", 1)  # of the same distributed run
        with Run(tmp_path / "run").lock():
            pass


def test_save_metrics_refuses_what_is_not_finite(tmp_path):
    with pytest.raises(FloatingPointError, match=r"^fad, metrics\.fid: not finite"):
        Run(tmp_path).save_metrics({"fad": float("nan"), "metrics": {"fid": float("inf")}})
    assert not list(tmp_path.iterdir())


def test_resume_allows_what_may_change_alone(tmp_path):
    values = {
        "seed": 0,
        "dataset": {"root": "a", "size": 0},
        "callbacks": {},
        "trainer": {"max_epochs": 1},
        "task": {"scheduler": {"T_max": 1}},
    }
    run = Run(tmp_path)
    assert run.resume(values) is None
    run.begin(OmegaConf.to_yaml(values), {})
    changed = values | {"seed": 1, "dataset": {"root": "a", "size": 1}}
    assert run.resume(changed) is None  # no epoch is saved
    run.save_metrics({"fad": 3.0})
    run.checkpoint.parent.mkdir()
    run.checkpoint.touch()
    message = r"dataset\.size \(0, now 1\); seed \(0, now 1\); resume it"
    with pytest.raises(ValueError, match=message):
        run.resume(changed)

    values |= {"dataset": {"root": "b", "size": 0}, "callbacks": {"bar": "wide"}}
    assert run.resume(values) == run.checkpoint and run.is_complete(values)
    longer = values | {"trainer": {"max_epochs": 2}}
    with pytest.raises(ValueError, match=r"T_max \(1, now 2\); resume"):
        run.resume(longer | {"task": {"scheduler": {"T_max": 2}}})
    assert run.resume(longer) == run.checkpoint and not run.is_complete(longer)
    run.checkpoint.unlink()
    with pytest.raises(FileNotFoundError, match="its checkpoint is gone"):
        run.resume(longer)
    run.checkpoint.touch()
    values["trainer"] = {"max_epochs": 0}  # as of a sweep whose job was trained longer
    assert run.resume(values) == run.checkpoint and run.is_complete(values)


def test_train_refuses_classes_that_could_not_be_loaded(trained, tmp_path):
    with pytest.raises(ValueError, match=rf"names '{MINE}'.*add trust=\[{MINE}\]"):
        fit(tmp_path, *FOREIGN)
    wrong = ["neuron._target_=no_such.MyLIF", "trust=[no_such.MyLIF]"]
    with pytest.raises(ValueError, match=r"trust names 'no_such\.MyLIF', which cannot"):
        fit(tmp_path, *FOREIGN, *wrong)
    assert not list(tmp_path.iterdir())

    folder = trained(*FOREIGN, f"trust=[{MINE}]")
    assert Run(folder).config.trust == [MINE]
    # What the run says of itself is no reason to trust it.
    with pytest.raises(ValueError, match=rf"add trust=\[{MINE}\]"):
        load_model(folder)
    assert any(isinstance(module, MyLIF) for module in load_model(folder, MINE).modules())


@pytest.mark.parametrize("part", ["dataset", "model", "task", "callbacks.x"])
def test_build_parts_calls_no_class_that_is_not_trusted(tmp_path, part):
    evil = f"++{part}={{_target_: pathlib.Path.touch, self: {tmp_path / 'touched'}}}"
    cfg = compose("train", [*TINY_CLASSIFICATION, evil])
    with pytest.raises(ValueError, match=r"names 'pathlib\.Path\.touch'.*add trust="):
        build_parts(cfg)
    assert not list(tmp_path.iterdir())


def test_load_model_refuses_other_models_and_foreign_classes(trained, tmp_path):
    folder = trained(*TINY_CLASSIFICATION)
    path = folder / runs.CONFIG
    text = path.read_text()
    # What stands outside the model's config does not pass, either.
    evil = f"evil: {{_target_: pathlib.Path.touch, self: {tmp_path / 'touched'}}}\n"
    other = r"(?s)not a checkpoint of this run's model .* leave out"
    for old, new, end, message in (
        ("hidden: 8", "hidden: 9", "", other),
        ("sj_taid.ALIFNode", "os.system", "", r"names 'os\.system'.*you trust it"),
        ("\n  neuron: ${neuron}\n", "\n  neuron: ${evil}\n", evil, "you trust it"),
    ):
        assert old in text
        path.write_text(text.replace(old, new) + end)
        with pytest.raises(ValueError, match=message):
            load_model(folder)
    assert not (tmp_path / "touched").exists()


def test_load_model_and_resume_where_the_backend_is_not(trained):
    folder = trained(*TINY_CLASSIFICATION)
    path = folder / runs.CONFIG
    path.write_text(path.read_text().replace("backend: auto", "backend: triton"))
    assert any(getattr(m, "backend", "") == "auto" for m in load_model(folder).modules())
    assert Run(folder).resume(plain(compose("train", TINY_CLASSIFICATION)))


def is_accelerated(model):
    return any(isinstance(module, AcceleratedNorm) for module in model.modules())


def test_models_are_accelerated_if_the_config_says_so(trained):
    cfg = compose("train", TINY_CLASSIFICATION)
    assert is_accelerated(build_parts(cfg).model)
    folder = trained(*TINY_CLASSIFICATION, "accelerate=false")
    assert not is_accelerated(load_model(folder))
    assert Run(folder).resume(plain(cfg))  # equal to rounding, as another backend is


class Hostile:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(b"PK half")], ids=["code", "half"]
)
def test_read_checkpoint_refuses_code_and_damage(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.ckpt"
    save({"state_dict": Hostile()}, path)
    with pytest.raises(ValueError, match=r"is not a whole checkpoint .* move it away") as info:
        read_checkpoint(path)
    assert "weights_only" not in str(info.value)  # torch's advice to load it all the same
    assert not (tmp_path / "hacked").exists()


TRUSTED = [
    *("sj_taid.ALIFNode", "sj_taid.training.generation.Generation"),
    *("spikingjelly.activation_based.neuron.IFNode", "torch.nn.modules.loss.MSELoss"),
    "torch.optim.lr_scheduler.CosineAnnealingLR",
]
OTHERS = [
    "sj_taid.training.run.Path",  # imported there
    "sj_taid.training.files._LogFile",  # empties a file
    *("sj_taid.data.base.torch.load", "sj_taid.data._Secret", "sj_taid.database.Data"),
    *("os.system", "sj_taid.swap_neurons", "torch.optim.lr_scheduler.Counter", "", 3),
]


def test_build_trusts_public_classes_and_no_others():
    for target in TRUSTED:
        build({"a": [{"_target_": target, "_partial_": True}]}, ())
    for target in OTHERS:
        with pytest.raises(ValueError, match=r"no public class of .* add trust="):
            build({"a": [{"_target_": target, "_partial_": True}]}, ())


def test_build_resolves_nothing(tmp_path):
    path = f"{{_target_: pathlib.Path, _args_: [{tmp_path}/hacked]}}"
    evil = f'\\${{oc.create:"{{_target_: pathlib.Path.touch, self: {path}}}"}}'
    cfg = OmegaConf.create({"decoder": {"_target_": "sj_taid.TAID", "T": evil}})
    with pytest.raises(ValueError, match=r"T: input should be a valid integer, .*\$\{oc\.create"):
        build(plain(cfg.decoder), ())
    assert not (tmp_path / "hacked").exists()


def test_atomic_write_leaves_what_was_there_after_an_error(tmp_path):
    path = tmp_path / "below" / "file"
    with atomic_write(path) as temporary:
        temporary.write_text("before")
    with pytest.raises(OSError, match="no space"), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise OSError("no space")
    assert path.read_text() == "before" and [*path.parent.iterdir()] == [path]


def test_no_write_follows_a_link(tmp_path, monkeypatch):
    (precious := tmp_path / "precious").write_text("mine")
    folder = Run(tmp_path / "run")
    links = ["train.log", "metrics.json", ".metrics.json.tmp", ".lock", "checkpoints/.x.tmp"]
    for name in links:
        (link := folder.folder / name).parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(precious)
    folder.save_metrics({"fad": 1.0})
    folder.begin("", {})
    _LogFile(folder.folder / "train.log").emit(logging.makeLogRecord({"msg": "a line"}))
    assert (folder.folder / "train.log").read_text() == "a line\n"
    with pytest.raises(OSError, match="symbolic links"), folder.lock():
        pytest.fail("a lock through a link")
    # Even if its name were known.
    monkeypatch.setattr(files, "token_hex", lambda n: "known")
    (folder.folder / ".a.known.tmp").symlink_to(precious)
    with pytest.raises(FileExistsError), atomic_write(folder.folder / "a"):
        pytest.fail("a write through a link")
    assert precious.read_text() == "mine"


def test_a_run_keeps_its_number_of_loader_processes(tmp_path):
    """Whatever the cores of the machine where it goes on: each draws augmentation of its own."""
    write_images(tmp_path / "images" / "a", 4)
    options = ["dataset=image_folder", f"dataset.root={tmp_path / 'images'}"]
    run = Run(tmp_path / "run")
    assert run.num_workers is None
    run.begin("dataset: {num_workers: 3}", {})
    for given, expected in ((), 3), (["dataset.num_workers=1"], 1):
        cfg = compose("train", [*options, *given])
        assert build_parts(cfg, run.num_workers).data.num_workers == expected
