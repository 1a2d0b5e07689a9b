"""The command line: arguments reach Hydra, and a user's errors are a few lines."""

import copy
import json
import logging
import re
import shlex
import sys
from unittest import mock

import lightning as L
import pytest
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch._utils import ExceptionWrapper

from sj_taid.__main__ import COMMANDS
from sj_taid.training import cli, config, run
from sj_taid.training.checkpoint import read_checkpoint
from sj_taid.training.train import train
from tests.training.conftest import TINY, TINY_CLASSIFICATION, UNMEASURED


@pytest.fixture
def run_in_place(sj_taid, tmp_path):
    quiet = ["hydra/job_logging=none", "hydra/hydra_logging=none"]
    folder = f"hydra.run.dir={tmp_path / 'run'}"
    return lambda *more: sj_taid("train", *UNMEASURED, *quiet, folder, *more)


def test_cli_usage(sj_taid, capsys):
    typo = "no command 'trian'; did you mean 'train'?"
    for wrong, message in {(): "required: COMMAND", ("trian",): typo}.items():
        with pytest.raises(SystemExit, match="2"):
            sj_taid(*wrong)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="0"):
        sj_taid("--help")
    text = capsys.readouterr().out
    assert all(line in text for line in COMMANDS.values())
    with pytest.raises(SystemExit):
        sj_taid("doctor")
    assert "backend torch: works" in capsys.readouterr().out


def test_error_of_a_worker_is_its_message_alone():
    try:
        raise OSError("a/04.png cannot be read\n  replace it")
    except OSError:
        caught = ExceptionWrapper(where="in DataLoader worker process 0")
    with pytest.raises(OSError, match="Original Traceback") as error:
        caught.reraise()
    assert cli.format_error(error.value).startswith(
        "OSError: a/04.png cannot be read\n  replace it\n(HYDRA"
    )


#: command lines, and what each ends with
ERRORS = {
    "train epochs=3": "^there is no epochs; the .* seed,.*elsewhere: .*trainer.max_epochs",
    "train neuron=plif neuron.tau=2": "^there is no neuron.tau; neuron has .* init_tau,",
    "train foo.bar=2": "^there is no foo.bar; the config has .* dataset,",
    "train trainer=gpu": "^no GPU is found: leave trainer=gpu or accelerator= out; see .sj",
    "train +nueron=lif": "the config has no nueron; there are .* neuron,",
    "train metric=null seed=null": "^~metric leaves a group out, =null does not",
    "train seed=0..2": r"^seed=0\.\.2 is no list of values; write: -m 'seed=range\(0,3\)'\n",
    "train neuron=alef": r"Could not find 'neuron/alef'(?s:.*)alif",
    "train dataset=mnist hydra.run.dir=run": "no MNIST at dataset.root=data/mnist",
    "train resume=nowhere": r"^resume= needs the folder of a run.*but got .*nowhere\n\(HYDRA",
    "train -m resume=nowhere seed=0,1": "in its own folder; leave hydra.run.dir= and -m",
    "train neuron=alif_channel": "neuron=alif_channel is for task=classification",
    "train -m seed=0 neuron._target_=os.system": r"'os\.system': no public class",
    "evaluate checkpoint=nowhere": "no checkpoint of a run at .*nowhere",
    "sample": "^checkpoint= is missing: give the folder of a run",
    "train seed=${nope}": "'nope' not found(?s:.*)full_key: seed",
    "sample checkpoint=file +lable=3": "no lable; there are checkpoint, columns, .*label,",
    "sample checkpoint=nowhere output=run.json": "output must name a picture",
    "train dataset=image_folder dataset.root=": r"^dataset\.root: .* at least 1 char.* it is ''",
    "train task=classification model.classes=3": r"^model\.classes=3, but dataset\.classes is 10",
    "train task=classification decoder=taid": "makes no images, which decoder= is for; leave it",
    "train model=fsvae_small task=classification": "FSVAE lacks classes; choose another",
    "train loss=tet": "^loss= is for task=classification; add that, or leave loss= out",
    "train dataset=nmnist": "takes ImageData, but dataset=nmnist is Recordings; for recordings add",
    "train trainer=null": "^trainer=null is no choice; trainer has default, gpu\n",
    "train ~trainer": "^~trainer leaves out what the others need; trainer has default, gpu\n",
    "train ~optimizer": "^no optimizer is chosen, which training needs; .* adam, adamw, sgd\n",
    "train hydra.run.dir=file/x": r"file/x'; choose another folder: hydra\.run\.dir=\.\.\.,",
    "train hydra.run.dir=empty/new/a seed=-1": "^seed: input should be greater",
    "train resume=tab": r"^a config is no YAML: .*'\\t' .*tab/config.yaml\", line 2,.*; mend it",
    "train resume=alias": r"alias/config\.yaml has an alias, \*a, .*; write it out",
    "train resume=list": r"list/config\.yaml must hold keys and values, not a list; put back",
    "compare {} []": r"^no finished run below {}, \[\]; an interrupted .* is repeated$",
}

ORIGIN = '{"choices": {}, "overrides": []}'
#: what the folder holds in which they are given; a name that ends with / is an empty folder
THERE = {
    "file": "",
    "empty/": "",
    "tab/config.yaml": "seed: 0\n\tx: 1\n",
    "alias/config.yaml": "a: &a [x, x]\nb: *a\n",
    "list/config.yaml": "[]\n",
    **{f"{text}/config.yaml": "seed: 0\n" for text in ("{}", "[]")},
    **{f"{text}/metrics.json": text for text in ("{}", "[]")},
    **{f"{run}/origin.json": ORIGIN for run in ("tab", "alias", "list")},
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.items())
def test_cli_reports_a_users_error_without_a_traceback(
    sj_taid, tmp_path, monkeypatch, capsys, arguments, message
):
    monkeypatch.chdir(tmp_path)
    for name, text in THERE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).mkdir() if name[-1] == "/" else (tmp_path / name).write_text(text)
    before = {*tmp_path.rglob("*")}
    with pytest.raises(SystemExit) as ended:
        sj_taid(*arguments.split())
    text = str(ended.value)
    assert re.search(message, text), text
    said = capsys.readouterr()
    assert "-m seed" not in arguments or re.search(message, said.out)  # before the sweep's end
    assert "Traceback" not in said.err + text
    new = {*tmp_path.rglob("*")} - before
    assert before <= {*tmp_path.rglob("*")}
    assert {path.name for path in new if path.is_file()} <= {".lock", "multirun.yaml"}
    assert "-m" in arguments or all(path.is_file() for path in new)


SWA = "lightning.pytorch.callbacks.StochasticWeightAveraging"
#: keys of a training's config, wrong values, and what the error says
VALUES = [
    ("model.x", 1, "^there is no model.x; model has T, .*, subpixel\n"),
    ("callbacks.progress_bar.x", 1, "^callbacks.progress_bar: .* keyword argument 'x'"),
    ("accelerate", None, "^accelerate: input should be a valid boolean, but it is None"),
    ("trust", [1], r"^trust: input should be a valid string, but it is \[1\]"),
    ("objective", "fadd", "objective=fadd is none of reconstruction"),
    ("compile", {"mode": "banana"}, "^compile=.* is not .*Unrecognized mode="),
    ("compile", {"banana": 1}, "^compile=.* is not .* argument 'banana'"),
    ("optimizer.lr", 1e30, r"^optimizer\.lr: input should be less than or equal to 1000"),
    ("trainer.gradient_clip_val", -1, r"^trainer\.gradient_clip_val: .* greater than or equal"),
    ("trainer.limit_test_batches", 0, r"^trainer\.limit_test_batches: .* greater than 0"),
    ("trainer.max_epochs", None, r"^trainer\.max_epochs: input should be a valid integer"),
    ("neuron_start.calibrate", 2, r"^neuron_start\.calibrate: input should be less than 1"),
    ("surrogate.alpha", -1, r"^surrogate\.alpha: input should be greater than 0"),
    ("trainer.precision", "64-true", "has no 32-bit weights, in which alone images are"),
    ("optimizer.betas", [2, 3], "Invalid beta parameter at index 0: 2"),
    ("trainer.plugins", [], r"^trainer\.plugins is set by the run; leave it out"),
    ("callbacks.swa._target_", SWA, "other weights than the saved ones; take"),
]


@pytest.fixture(scope="module")
def cfg():
    return config.compose("train", [*TINY, "surrogate=atan"])


@pytest.mark.parametrize(("key", "value", "message"), VALUES, ids=lambda value: str(value)[:40])
def test_train_refuses_a_value_before_anything_is_written(cfg, tmp_path, key, value, message):
    cfg = copy.deepcopy(cfg)
    OmegaConf.update(cfg, key, value, force_add=True)
    with pytest.raises(cli.USER_ERRORS) as caught:
        train(cfg, tmp_path)
    assert re.search(message, cli.format_error(caught.value)) and not [*tmp_path.iterdir()]


STOP = "+callbacks.stop={_target_: lightning.pytorch.callbacks.EarlyStopping, monitor: nope}"
ROUNDED = ["neuron.backend=torch", "trainer.precision=16-true", "trainer.limit_train_batches=1"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*UNMEASURED, STOP], "^Early stopping .* `nope` .* `val/reconstruction`"),
        (
            [*TINY_CLASSIFICATION, *ROUNDED],
            "^a parameter is not finite in epoch 1, .* diverged; .*bf16-true or 16-mixed: 16-true",
        ),
    ],
)
def test_cli_reports_a_users_error_that_the_training_meets(sj_taid, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as ended:
        sj_taid("train", *arguments, "~logger", f"hydra.run.dir={tmp_path}")
    assert len(str(ended.value).splitlines()) <= 3


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_help_has_a_line_for_each_key(sj_taid, capsys, command):
    with pytest.raises(SystemExit, match="0"):
        sj_taid(command, "--help")
    said = capsys.readouterr().out
    keys = run.flatten(OmegaConf.to_container(config.compose(command)))
    explained = re.findall(r"^ *(\w+): \S+ # ", said, re.M)
    assert {*explained} == {key.rpartition(".")[2] for key in keys} and "neuron" not in said


def test_ctrl_c_ends_a_command_without_a_traceback(sj_taid, monkeypatch, capsys):
    """Python then ends it by the signal, so a shell's loop ends with it."""
    monkeypatch.setattr(cli, "main", mock.Mock(side_effect=KeyboardInterrupt("Stopped.")))
    with pytest.raises(KeyboardInterrupt) as interrupt:
        sj_taid("train")
    sys.excepthook(interrupt.type, interrupt.value, interrupt.tb)
    assert capsys.readouterr().err == "Stopped.\n"


def test_cli_shows_the_traceback_where_hydra_would(sj_taid, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(OmegaConfBaseException, match="needs the folder of a run"):
        sj_taid("train", "resume=nowhere")


def test_folder_name_tells_any_overrides_apart():
    assert config.folder_name("neuron=lif,seed=0") == "neuron-lif-seed-0"
    many = [
        *("", "a=1", "a=b,c=d", "a=b-c=d", "a=b,c.d=1", "a=b,c=d.1", "a=1.", "a=1,", "+a=1"),
        *("model.stages=[[4],[6]]", "model.stages=[[4,6]]", "lr=1e-3", "lr=1e+3", "x='a b:c'"),
        *("x=" + "y" * 300 + f",seed={seed}" for seed in range(2)),
    ]
    names = [*map(config.folder_name, many)]
    assert len(set(names)) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9._][A-Za-z0-9._-]{0,118}[A-Za-z0-9_]", name), name


def test_jobs_have_folders_of_their_own():
    def folder(*overrides):
        return config.compose("train", overrides, return_hydra_config=True).hydra.sweep.subdir

    assert folder("seed=1", "~logger", "cache_dir=/x", "pictures=false") == "seed-1"
    images = "dataset=image_folder"
    assert folder(images, "dataset.root=cats") != folder(images, "dataset.root=dogs")
    # Other callbacks may change what is trained.
    assert folder("callbacks=quiet") == "callbacks-quiet"


class CtrlC(L.Callback):
    """Interrupts in a given epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_batch_end(self, trainer, *_):
        if trainer.current_epoch == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_interrupted_run_resumes_by_the_command_that_it_names(
    sj_taid, tmp_path, monkeypatch, capsys
):
    custom = tmp_path / "one's own" / "callbacks"
    custom.mkdir(parents=True)
    (custom / "mine.yaml").write_text(f"ctrl_c:\n  _target_: {__name__}.CtrlC\n  epoch: 0\n")
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    there = run.Run(place / "one's größe, lr=0 #2")  # not as a sweep names it
    folder = shlex.split(config.argument("hydra.run.dir", there.folder))
    options = ["callbacks=mine", "--config-dir", str(custom.parent), "trainer.max_epochs=3"]
    trust = f"trust=[{__name__}.CtrlC]"
    with pytest.raises(KeyboardInterrupt, match=r"Stopped\. Give the same command again"):
        sj_taid("train", *UNMEASURED, trust, *folder, *options)
    again = ["train", *shlex.split(config.argument("resume", there.folder))]
    # What the run says of itself is no reason to trust it.
    with pytest.raises(SystemExit, match=rf"names '{__name__}\.CtrlC'.*add trust="):
        sj_taid(*again)
    for more in (["+callbacks.ctrl_c.epoch=2"], []):  # its config is the last one
        with pytest.raises(KeyboardInterrupt, match=r"^Stopped\. Resume with: ") as stopped:
            sj_taid(*again, trust, *more)
        assert shlex.split(str(stopped.value).partition("sj-taid ")[2]) == again
    before = read_checkpoint(there.checkpoint)
    with pytest.raises(SystemExit, match="must be at least the 2 epochs that are trained"):
        sj_taid(*again, trust, "trainer.max_epochs=1")
    assert there.config.trainer.max_epochs == 3 and not there.is_finished

    sj_taid(*again, "callbacks=quiet", "trainer.max_epochs=4")
    metrics, resumed = there.metrics, read_checkpoint(there.checkpoint)
    assert metrics["epochs"] == 4 and metrics["choices"]["callbacks"] == "mine"
    assert metrics["training_seconds"] > before["callbacks"]["Stopwatch"]["time_elapsed"]["train"]
    history, earlier = (saved["callbacks"]["History"] for saved in (resumed, before))
    assert len(history["neurons"]) == 5 and len(history["epochs"]) == 4
    assert history["epochs"][:2] == earlier["epochs"] and resumed["global_step"] == 2 * 4
    assert [path.name for path in place.iterdir()] == [there.folder.name]
    assert "Epoch" not in capsys.readouterr().out  # since these callbacks have no progress bar
    sj_taid(*again)
    assert "finished already" in capsys.readouterr().out and there.metrics == metrics


@pytest.mark.slow
def test_interrupted_sweep_goes_on_by_the_command_that_it_names(sj_taid, tmp_path, monkeypatch):
    custom = tmp_path / "one's=own" / "callbacks" / "mine.yaml"
    custom.parent.mkdir(parents=True)
    custom.write_text(text := f"ctrl_c:\n  _target_: {__name__}.CtrlC\n  epoch: 0\n")
    monkeypatch.chdir(tmp_path)
    sweep = ["train", "-m", "seed=0,1", *UNMEASURED, f"trust=[{__name__}.CtrlC]", "~logger"]
    sweep += ["callbacks=mine", "--config-dir", str(custom.parents[1])]
    words = sweep
    for _ in range(2):  # of the command that it names, too
        with pytest.raises(KeyboardInterrupt, match=r"^Stopped\. Go on with the sweep") as stopped:
            sj_taid(*words)
        words = shlex.split(str(stopped.value).partition(": sj-taid ")[2])
        assert [word for word in words if word in sweep] == sweep and len(words) == len(sweep) + 1
    custom.write_text(text.replace("0", "9"))
    sj_taid(*words)
    (place,) = {path.parents[1] for path in tmp_path.rglob(run.METRICS)}
    assert len([*place.iterdir()]) == 3  # each job in its folder of before, and multirun.yaml
    with pytest.raises(KeyboardInterrupt, match=r"^4$"), cli.explain_sweep("train", []):
        raise KeyboardInterrupt(4)  # of no sweep


def test_resume_refuses_what_the_run_does_not_have(trained, sj_taid):
    folder = trained(*UNMEASURED)
    before = run.Run(folder).config
    for choice, message in (
        ("seed=1", "as it is, without seed=; leave it out, or start a new run"),
        ("metric.inception_weights=x", "the run has no metric; leave it out"),
    ):
        with pytest.raises(SystemExit, match=message):
            sj_taid("train", f"resume={folder}", choice)
    assert run.Run(folder).config == before


@pytest.mark.slow
def test_resume_takes_choices_as_the_start_does(run_in_place, sj_taid, tmp_path):
    timer = "{_target_: lightning.pytorch.callbacks.Timer, duration: '00:01:00:00'}"
    run_in_place("~logger", "+trainer.max_steps=5", f"+callbacks.timer={timer}")
    folder = tmp_path / "run"
    sj_taid("train", f"resume={folder}", "logger=csv", "trainer.max_epochs=2", "pictures=true")
    there = run.Run(folder)
    assert (there.config.logger.name, there.config.trainer.max_steps) == ("csv", 5)
    words = there.metrics["command"].split()
    assert "trainer.max_epochs=2" in words and "+trainer.max_steps=5" in words
    assert "trainer.max_epochs=1" not in words
    assert (folder / "csv").is_dir() and (folder / "reconstructions.png").is_file()


def test_run_without_a_terminal_speaks(run_in_place, caplog):
    caplog.set_level("INFO")
    run_in_place("trainer.max_epochs=2")
    said = [line for line in caplog.messages if line.startswith(("Training", "Epoch"))]
    # By default a generator has no validation set.
    assert re.match(r"Training FSVAE on digits, 1438 samples, by cpu in .*run$", said[0])
    assert [line[:12] for line in said[1:]] == ["Epoch 1 of 2", "Epoch 2 of 2"]
    assert all(" val/reconstruction " in line for line in said[1:])
    caplog.clear()
    run_in_place("trainer.max_epochs=3")
    assert "resumes after epoch 2 of 3" in caplog.text and "Epoch 3 of 3" in caplog.text


def test_train_without_epochs_and_progress_bar(run_in_place, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    # It is not where Lightning was imported before logging was set up.
    monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", True)
    options = ["callbacks=quiet", "seed=3", "pictures=true", "+trainer.profiler=simple"]
    run_in_place("trainer.max_epochs=0", *options)
    assert f"Metrics: {tmp_path / 'run' / run.METRICS}" in caplog.messages[-1]
    assert "FIT Profiler Report" in caplog.text
    metrics = json.loads((tmp_path / "run" / run.METRICS).read_text())
    assert metrics["epochs"] == 0 and "seed=3" in metrics["overrides"]
    assert metrics["command"] == shlex.join(["sj-taid", "train", *metrics["overrides"]])
    assert str(tmp_path) not in metrics["command"]
