"""The command line: what is said to the shell reaches Hydra, and errors come at once."""

import importlib
import json
import logging
import re
import shlex
import subprocess
import sys

import lightning as L
import pytest
from omegaconf import OmegaConf

from sj_taid import doctor
from sj_taid.training import cli, run
from sj_taid.training.composing import compose
from tests.training.conftest import TINY_AUTOENCODING


@pytest.fixture
def train(sj_taid, tmp_path):
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    return lambda *more: sj_taid("train", *TINY_AUTOENCODING, *quiet, folder, *more)


def test_a_typo_is_reported_before_anything_heavy_is_imported():
    program = """if True:
        import sys
        from sj_taid.training.cli import main
        try:
            main("train")
        finally:
            heavy = {"lightning", "torchvision", "matplotlib", "torchmetrics"} & sys.modules.keys()
            print("imported", sorted(heavy))
    """
    done = subprocess.run(
        [sys.executable, "-c", program, "neuron=alef"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and done.stdout.strip() == "imported []"
    assert "alif" in done.stderr and "Traceback" not in done.stderr


def test_what_there_is_to_say(sj_taid, tmp_path, capsys):
    with pytest.raises(SystemExit, match=f"no checkpoint at {tmp_path}; a run leaves it in"):
        sj_taid("train", f"resume={tmp_path}")
    for wrong, message in (
        ([], "give a command"),
        (["trian"], "there is no command 'trian'; did you mean train[?]"),
        (["xyz"], "there is no command 'xyz'$"),
    ):
        with pytest.raises(SystemExit, match=message):
            sj_taid(*wrong)
        assert capsys.readouterr().err.startswith("usage: sj-taid {train,")
    sj_taid("--help")
    said = capsys.readouterr().out
    for name, command in (cli.COMPOSED | cli.OTHERS).items():
        assert re.search(rf"^  {name} +{re.escape(command.__doc__)}$", said, re.M)
    with pytest.raises(SystemExit) as ended:
        sj_taid("doctor")
    assert ended.value.code == 0 and "backend torch: works" in capsys.readouterr().out


def test_a_command_without_its_run_says_so(sj_taid):
    for command in ("evaluate", "sample", "fit_prior"):
        with pytest.raises(SystemExit, match=r"give checkpoint=RUN, the folder of a run"):
            sj_taid(command)


def test_what_cannot_be_composed_is_said_in_lines(sj_taid, capsys):
    with pytest.raises(SystemExit) as ended:
        sj_taid("train", "nueron=lif")
    said = capsys.readouterr().err + str(ended.value)
    assert "Key 'nueron' is not in struct" in said and "Traceback" not in said


def test_none_of_a_group_is_chosen_with_a_tilde(sj_taid, capsys):
    with pytest.raises(SystemExit, match=r"metric=null names no choice .* write ~metric for none"):
        sj_taid("train", "metric=null")
    sj_taid("train", "~metric", "resume=null", "task.scheduler=null", "--cfg", "job")
    composed = OmegaConf.create(capsys.readouterr().out)
    assert "metric" not in composed and composed.resume is None


def test_a_place_without_its_key_is_named_with_it(sj_taid, tmp_path):
    for command, key in (("train", "resume"), ("sample", "checkpoint")):
        with pytest.raises(SystemExit, match=f"is a place: give {key}={re.escape(str(tmp_path))}"):
            sj_taid(command, str(tmp_path))


def test_a_folder_of_custom_configs(sj_taid, tmp_path, capsys):
    (tmp_path / "neuron").mkdir()
    (tmp_path / "neuron" / "mine.yaml").write_text("_target_: mypkg.MyLIF\n")
    for option in (["--config-dir", str(tmp_path)], [f"hydra.searchpath=[file://{tmp_path}]"]):
        sj_taid("train", *option, "neuron=mine", "--cfg", "job", "--package", "neuron")
        assert "mypkg.MyLIF" in capsys.readouterr().out


def test_places_as_the_shell_gives_them(monkeypatch, tmp_path, sj_taid, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    said = ["dataset=image_folder", "dataset.root=~/my photographs", "cache_dir=~/it's/a=b,c"]
    sj_taid("train", *said, "--cfg", "job")
    composed = OmegaConf.create(capsys.readouterr().out)
    assert composed.dataset.root == f"{tmp_path}/my photographs"
    assert composed.cache_dir == f"{tmp_path}/it's/a=b,c"
    for place in ("neuron=lif,seed=[0]", "'neuron=lif,seed=[0]'", '"neuron=lif,seed=[0]"'):
        sj_taid("sample", f"checkpoint={place}", "--cfg", "job")
        composed = OmegaConf.create(capsys.readouterr().out)
        assert composed.checkpoint == "neuron=lif,seed=[0]"


def test_the_command_line_of_a_resumed_run(tmp_path):
    folder = tmp_path / "it's neuron=lif,seed=0"
    assert cli.resuming(["seed=1", "-m"]) == ["seed=1", "-m"]
    said = cli.quoted_place(f"resume={folder}")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*seed=0; a run leaves it in"):
        cli.resuming([said])

    checkpoint = folder / run.CHECKPOINTS / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.touch()
    with pytest.raises(FileNotFoundError, match=r"(?s)overrides\.yaml.*repeat that command"):
        cli.resuming([said])

    of_old, notes = folder / ".hydra" / run.OVERRIDES, folder / run.OVERRIDES
    of_old.parent.mkdir()
    of_old.write_text("- neuron=lif\n- model.stages=[[4],[6]]\n")
    for place in (folder, checkpoint, f'"{folder}"'):
        assert cli.resuming(["seed=1", cli.quoted_place(f"resume={place}"), "--cfg", "job"]) == [
            "neuron=lif",
            "model.stages=[[4],[6]]",
            f'hydra.run.dir="{folder}"',
            f'resume="{checkpoint}"',
            "seed=1",
            "--cfg",
            "job",
        ]
    notes.write_text("- seed=3\n")
    assert cli.resuming([said])[0] == "seed=3"


def test_a_folder_is_named_by_the_overrides_however_many():
    assert cli.folder_name(["seed=0", "neuron=lif"]) == "neuron-lif-seed-0"
    assert cli.folder_name(["decoder=taid_temporal"]) == "decoder-taid_temporal"
    apart = ["+cache_dir=/x", "~callbacks", "callbacks.bar=1", "seed=1"]
    assert cli.folder_name(apart, ["cache_dir", "callbacks"]) == "seed-1"
    assert cli.folder_name(["bar=none", "bar.x=1", "seed=1"], ["bar=none"]) == "bar.x-1-seed-1"
    many = [
        *("", "a=1", "a=b,c=d", "a=b-c=d", "a=b,c.d=1", "a=b,c=d.1", "a=1.", "a=1,", "+a=1"),
        *("model.stages=[[4],[6]]", "model.stages=[[4,6]]", "lr=1e-3", "lr=1e+3", "x='a b:c'"),
        *("x=" + "y" * length for length in (118, 119, 300)),
        *("x=" + "y" * 300 + f",seed={seed}" for seed in range(2)),
    ]
    names = [cli.folder_name(overrides.split(", ")) for overrides in many]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9._][A-Za-z0-9._-]{0,118}[A-Za-z0-9_]", name), name


def test_callbacks_that_may_change_what_is_trained_are_choices():
    places = compose("train", return_hydra_config=True).hydra.job.config.override_dirname
    looks = ["callbacks=quiet", "callbacks.progress_bar.refresh_rate=5", "~logger", "seed=1"]
    assert cli.folder_name(looks, places.exclude_keys) == "seed-1"
    averaged = ["+callbacks.ema.decay=0.9", "callbacks=mine"]
    names = {cli.folder_name([one], places.exclude_keys) for one in averaged}
    assert len(names) == 2 and "" not in names


class CtrlC(L.Callback):
    """Interrupts in a given epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("epoch", "message"),
    [
        (0, "Interrupted. Give the same command again, since no epoch of it was whole"),
        (1, "train resume={folder}$"),
    ],
)
def test_ctrl_c_says_how_to_go_on(train, tmp_path, epoch, message):
    stop = [f"+callbacks.stop._target_={__name__}.CtrlC", f"+callbacks.stop.epoch={epoch}"]
    folder = re.escape(shlex.quote(str(tmp_path / "run")))
    with pytest.raises(SystemExit, match=message.format(folder=folder)):
        train("trainer.max_epochs=3", *stop)


def test_resume_repeats_where_ones_own_choices_lie(train, sj_taid, tmp_path):
    own = tmp_path / "own" / "callbacks"
    own.mkdir(parents=True)
    stop = f"progress_bar:\n  _target_: {__name__}.CtrlC\n  epoch: "  # which is no choice
    (own / "mine.yaml").write_text(f"{stop}0\n")
    with pytest.raises(SystemExit, match="since no epoch of it was whole"):
        train("callbacks=mine", "trainer.max_epochs=2", "--config-dir", str(own.parent))
    for epoch, whole in ((1, 1), (2, 2)):  # from the start, and from the first epoch
        (own / "mine.yaml").write_text(f"{stop}{epoch}\n")
        resume = ["train", f"resume={tmp_path / 'run'}"]
        if epoch == 1:
            with pytest.raises(SystemExit, match="Go on with"):
                sj_taid(*resume)
        else:
            sj_taid(*resume)
        state = run.read_checkpoint(run.Run(tmp_path / "run").checkpoint)
        assert state["epoch"] + 1 == whole


def test_commands_without_hydra_say_what_is_logged(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setitem(cli.OTHERS, "report", logging.getLogger(cli.__name__).info)
    monkeypatch.setattr(sys, "argv", ["sj-taid", "report", "1 of 2"])
    cli.main()
    assert capsys.readouterr().err == "['1 of 2']\n"


def test_a_run_of_no_epochs_and_no_progress_bar(train, tmp_path, caplog):
    caplog.set_level("INFO")
    train("trainer.max_epochs=0", "trainer.enable_progress_bar=false", "seed=3", "pictures=true")
    assert caplog.messages[-1] == f"Metrics, pictures: {tmp_path / 'run'}"
    metrics = json.loads((tmp_path / "run" / run.METRICS).read_text())
    assert metrics["epochs"] == 0 and "seed=3" in metrics["overrides"]
    assert metrics["command"] == shlex.join(["sj-taid", "train", *metrics["overrides"]])
    assert str(tmp_path) not in metrics["command"]


def test_the_commit_is_asked_for_when_a_run_starts(monkeypatch):
    doctor.commit.cache_clear()
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: asked.append(1) or pytest.fail())
    importlib.reload(doctor)
    assert not asked
