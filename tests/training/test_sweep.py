"""Many runs: a folder for each, none overwritten, and a killed sweep goes on."""

import json
import re
import subprocess
from statistics import mean

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from sj_taid.training import commands, run
from sj_taid.training.commands import train
from sj_taid.training.composing import compose
from tests.training.conftest import TINY, script


def test_a_parallel_sweep_and_its_continuation(tmp_path, cache):
    """Side by side first; then one job has lost its end, and the sweep goes on one by one."""

    def sweep(*overrides):
        command = script(
            "train.py", "-m", "seed=0,1", *TINY, "callbacks=quiet", f"cache_dir={cache}",
            f"hydra.sweep.dir={tmp_path}", *overrides,
        )  # fmt: skip
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    sweep("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    folders = {json.loads(path.read_text())["seed"]: path.parent for path in find(tmp_path)}
    assert folders.keys() == {0, 1}
    figures = {
        seed: json.loads((folder / run.METRICS).read_text()) for seed, folder in folders.items()
    }
    assert figures[0]["fad"] != figures[1]["fad"]
    assert figures[0]["choices"]["neuron"] == "alif" and "seed=0" in figures[0]["command"]
    assert str(tmp_path) not in figures[0]["command"]

    before = (folders[0] / run.METRICS).stat().st_mtime_ns
    (folders[1] / run.METRICS).unlink()
    took = round(mean(one["training_seconds"] for one in figures.values()))
    planned = sweep("--dry-run").splitlines()
    assert planned[-1] == "jobs: 1 finished, 1 half done"
    for seed, state in enumerate(("finished", "half done")):
        assert re.fullmatch(rf"{state} +{took} s  {folders[seed]}", planned[seed])
    assert sweep("--dry-run", "neuron=lif,plif").splitlines()[0].split()[:2] == ["new", "?"]
    assert sorted(tmp_path.iterdir()) == sorted([*folders.values(), tmp_path / "multirun.yaml"])
    said = sweep()
    assert said.count("is finished already") == 1
    assert (folders[0] / run.METRICS).stat().st_mtime_ns == before
    assert len(find(tmp_path)) == 2
    again = json.loads((folders[1] / run.METRICS).read_text())
    assert again["reconstruction"] == figures[1]["reconstruction"]


def find(folder):
    return sorted(folder.glob(f"*/{run.METRICS}"))


class Kill(L.Callback):
    """Ends the run in its third epoch."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == 2:
            raise SystemExit("killed")


def test_a_half_done_run_goes_on_from_its_last_epoch(tiny, tmp_path):
    killer = f"+callbacks.kill._target_={__name__}.Kill"
    with pytest.raises(SystemExit, match="killed"):
        train(tiny("trainer.max_epochs=4", killer), tmp_path)
    half = torch.load(run.Run(tmp_path).checkpoint, weights_only=True)
    assert half["epoch"] == 1 and not (tmp_path / run.METRICS).exists()

    metrics = train(tiny("trainer.max_epochs=4"), tmp_path)
    whole = torch.load(run.Run(tmp_path).checkpoint, weights_only=True)
    assert metrics["epochs"] == 4 and whole["global_step"] == 4 * 2
    assert whole["callbacks"]["Pictures"]["epochs"][:2] == half["callbacks"]["Pictures"]["epochs"]
    assert metrics["training_seconds"] > half["callbacks"]["Timer"]["time_elapsed"]["train"]


def test_one_process_at_a_time_in_a_folder(tmp_path):
    with run.Run(tmp_path / "run").lock():
        message = r"another process .*/run; wait .*hydra\.run\.dir"
        with pytest.raises(RuntimeError, match=message), run.Run(tmp_path / "run").lock():
            pytest.fail("held twice")
        with run.Run(tmp_path / "other").lock():
            pass
    with run.Run(tmp_path / "run").lock():
        pass


def test_the_other_processes_of_a_distributed_run_do_not_wait_for_its_first(tmp_path, monkeypatch):
    with run.Run(tmp_path).lock():
        monkeypatch.setattr(rank_zero_only, "rank", 1)
        with run.Run(tmp_path).lock():
            pass


def test_a_folder_keeps_its_run(tmp_path):
    cfg = OmegaConf.create(
        {"seed": 0, "dataset": {"root": "a", "size": "${seed}"}, "callbacks": {}}
    )
    there = run.Run(tmp_path)
    places = ["dataset.root", "callbacks"]
    assert there.finished(cfg, places) is None
    there.save_config(cfg)
    assert there.finished(cfg, places) is None
    there.save_metrics({"fad": 3.0})
    assert there.finished(cfg, places) == {"fad": 3.0}

    cfg.dataset.root, cfg.callbacks = "b", {"bar": "wide"}
    assert there.finished(cfg, places) == {"fad": 3.0}
    cfg.seed = 1
    with pytest.raises(
        FileExistsError, match=r"differs in dataset\.size \(0, now 1\), seed \(0, now 1\)"
    ):
        there.finished(cfg, places)


def test_sweeps_of_one_second_have_folders_of_their_own():
    folders = set()
    for _ in range(2):
        cfg = compose("train", return_hydra_config=True)
        folders |= {cfg.hydra.sweep.dir, cfg.hydra.run.dir}
    assert len(folders) == 4


def test_a_command_leaves_out_where_things_lie_however_it_is_said():
    said = ["+dataset.root=/home/me", "++cache_dir=/data", "callbacks.bar.width=3", "seed=1"]
    apart = ["dataset.root", "cache_dir", "callbacks"]
    hydra_cfg = OmegaConf.create(
        {
            "job": {"config": {"override_dirname": {"exclude_keys": apart}}},
            "overrides": {"task": said},
        }
    )
    assert commands.origin("train", hydra_cfg) == {
        "overrides": ["seed=1"],
        "command": "sj-taid train seed=1",
    }
