"""Models by name: every one that is listed loads, draws or classifies, and has a whole card."""

import errno
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import sj_taid
from sj_taid import create_model, list_models, pretrained

pytest.importorskip("safetensors", reason="needs the extra pretrained")

PACKAGE = Path(pretrained.__file__).parent
NAMES = list_models()
NAME = "classifier_digits_alif"
MEGABYTE = 2**20


@pytest.fixture
def folder(tmp_path):
    """A copy of a model, to do things to."""
    return Path(shutil.copytree(PACKAGE / NAME, tmp_path / "model"))


def change(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


# ---- each model ----


@pytest.mark.parametrize("name", NAMES)
def test_model_works(name):
    model = create_model(name, pretrained=True)
    assert not model.training
    assert not torch.equal(*(next(m.parameters()) for m in (model, create_model(name))))
    if hasattr(model, "sample"):
        output = model.sample(4)
        assert output.shape[1:] == (model.in_channels, model.image_size, model.image_size)
        assert output.std(0).mean() > 0.05  # four images, not one
    else:
        output = model(torch.rand(3, model.in_channels, model.image_size, model.image_size))
        assert output.shape == (3, model.classes)
    assert output.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_card_is_whole(name):
    card = (PACKAGE / name / "README.md").read_text(encoding="utf-8")
    config = pretrained.read_config(name)
    table = dict(re.findall(r"^\| (\w+) \| (.+) \|$", card, re.M))
    rows = ("data", "command", "commit", "epochs", "seed", "versions", "machine", "licence")
    assert set(rows) <= table.keys()
    metrics = config["metrics"]
    assert table["command"] == f"`{metrics['command']}`"
    assert re.fullmatch(r"[0-9a-f]{12}", table["commit"]), "of a clean checkout"
    figures = re.findall(r"^\| .+ [↑↓] \| [\d.]+ \| .+ \|$", card, re.M)
    assert figures
    assert re.search(r"^license: mit$", card, re.M)
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
    exec(compile(code, name, "exec"), {})


@pytest.mark.parametrize("name", NAMES)
def test_files_are_small_and_name_no_place(name):
    paths = sorted((PACKAGE / name).iterdir())
    assert [path.name for path in paths] == ["README.md", "config.json", "model.safetensors"]
    assert sum(path.stat().st_size for path in paths) <= 5 * MEGABYTE
    for path in paths[:2]:
        assert not re.search(r"(?<![\w.)])[~.]?/\w|file:", path.read_text(encoding="utf-8"))


def test_all_of_them_are_small():
    assert sum(path.stat().st_size for path in PACKAGE.glob("*/*")) <= 15 * MEGABYTE


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_figures_of_the_card_are_measured_again(name, tmp_path):
    """Where the data are: by the card's command, with the weights of the package."""
    pytest.importorskip("hydra", reason="needs the extra train")
    from sj_taid.training.composing import compose, instantiate
    from sj_taid.training.evaluation import bare_trainer, seeded

    metrics = pretrained.read_config(name)["metrics"]
    cfg = compose("train", metrics["overrides"])
    data = instantiate(cfg.dataset)
    try:
        data.prepare_data()
        data.setup()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    evaluator = cfg.get("metric") and instantiate(cfg.metric, cache_dir=tmp_path, seed=cfg.seed)
    task = instantiate(cfg.task, model=create_model(name, pretrained=True), optimizer=None)
    with seeded(cfg.seed):
        figures = task.figures(bare_trainer("cpu"), data, evaluator)
    # FAD looks through an autoencoder that each machine trains for itself.
    tolerance = {"accuracy": 0.005, "reconstruction": 0.03, "fad": 0.25}
    measured = tolerance.keys() & figures.keys()
    assert measured == tolerance.keys() & metrics.keys() and measured
    for figure in measured:
        assert figures[figure] == pytest.approx(metrics[figure], rel=tolerance[figure]), figure


# ---- from elsewhere ----


def same(model, name=NAME):
    expected = create_model(name, pretrained=True).state_dict()
    found = model.state_dict()
    return expected.keys() == found.keys() and all(
        torch.equal(found[k], expected[k]) for k in found
    )


def test_a_folder(folder):
    assert same(create_model(folder, pretrained=True))
    assert same(create_model(str(folder), pretrained=True, sha256=digest(folder)))


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_url_is_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SJ_TAID_CACHE", str(tmp_path / "cache"))
    url = folder.as_uri()
    create_model(url)
    assert not list(tmp_path.glob("cache/**/*.safetensors"))  # none were asked for
    assert same(create_model(url, pretrained=True))
    shutil.rmtree(folder)
    assert same(create_model(f"{url}/", pretrained=True))
    with pytest.raises(FileNotFoundError, match=r"other/config\.json cannot be fetched"):
        create_model(f"{url}/other")


def test_the_hub(folder, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    calls = []

    class Api:
        def create_repo(self, repository, **options):
            calls.append((repository, options))

        def upload_folder(self, **options):
            calls.append(options)
            return SimpleNamespace(commit_url="https://there/commit/1")

    def snapshot_download(repository, **options):
        calls.append((repository, options))
        return str(folder)

    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    files = ["config.json", "model.safetensors", "README.md"]
    assert pretrained.push_to_hub(folder, "me/net", private=True) == "https://there/commit/1"
    assert calls == [
        ("me/net", {"private": True, "exist_ok": True}),
        {"repo_id": "me/net", "folder_path": folder, "allow_patterns": files},
    ]
    calls.clear()
    assert same(create_model("hf://me/net@v1", pretrained=True))
    ((repository, options),) = calls
    assert repository == "me/net" and options["revision"] == "v1"
    assert sorted(options["allow_patterns"]) == sorted(files)
    create_model("hf://me/net")
    assert "model.safetensors" not in calls[-1][1]["allow_patterns"]

    calls.clear()
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="SHA-256"):
        pretrained.push_to_hub(folder, "me/net")
    assert not calls


# ---- what is wrong ----


def test_no_such_model():
    with pytest.raises(ValueError, match=f"no model 'typo'; give one of .*{NAME}.*hf://"):
        create_model("typo")


def test_damaged_weights_are_an_error(folder):
    (folder / "model.safetensors").write_bytes(b"half")
    remedy = r"damaged or another one: copy the folder anew, or export its run again"
    with pytest.raises(
        ValueError, match=rf"as config\.json states, but .* has [0-9a-f]{{64}}; it is {remedy}"
    ):
        create_model(folder, pretrained=True)
    change(folder, sha256=digest(folder))
    with pytest.raises(ValueError, match=r"does not fit config\.json: .*eader.*; copy the folder"):
        create_model(folder, pretrained=True)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .*model\.safetensors; sj-taid export"):
        create_model(folder, pretrained=True)


def test_a_cache_that_cannot_be_written(folder, tmp_path, monkeypatch):
    (taken := tmp_path / "taken").write_text("")
    monkeypatch.setenv("SJ_TAID_CACHE", str(taken))
    said = r"taken.* cannot be written .*let SJ_TAID_CACHE name another"
    with pytest.raises(OSError, match=said):
        create_model(folder.as_uri())

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setenv("SJ_TAID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    with pytest.raises(OSError, match=r"cannot be written .*No space left.*; make room"):
        create_model(folder.as_uri())


def test_another_digest_than_the_one_asked_for_is_an_error(folder):
    asked = "0" * 64
    said = rf"SHA-256 {asked}, as sha256= asks, but .* has {digest(folder)}"
    with pytest.raises(ValueError, match=f"{said}; it is as exported, so sha256= means another"):
        create_model(folder, pretrained=True, sha256=asked)
    with pytest.raises(ValueError, match="as sha256= asks"):  # as of a variable that is not set
        create_model(folder, pretrained=True, sha256="")
    create_model(folder, pretrained=True, sha256=digest(folder).upper())
    with pytest.raises(ValueError, match="sha256= is of weights, which pretrained=True asks for"):
        create_model(folder, sha256=asked)
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"as sha256= asks, .*; it is damaged or another one:"):
        create_model(folder, pretrained=True, sha256=asked)


def test_the_remedy_is_that_of_the_place(folder, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(folder))
    monkeypatch.setenv("SJ_TAID_CACHE", str(tmp_path / "cache"))
    change(folder, sha256=None)
    copy = rf"{tmp_path}/cache/models/\w+"
    for source, remedy in {
        str(folder): "copy the folder anew, or export its run again",
        folder.as_uri(): f"delete {copy}, a copy, and it is fetched anew",
        "hf://me/net@v1": "hf download me/net --force-download --revision v1",
    }.items():
        with pytest.raises(ValueError, match=f"; .*{remedy}$"):
            create_model(source)
    monkeypatch.setattr(pretrained, "__file__", str(folder / "__init__.py"))
    shutil.copytree(folder, folder / "mine")
    with pytest.raises(ValueError, match=r"; reinstall sj-taid$"):
        create_model("mine")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("[]", "expected a class and its arguments as its 'model', but got None"),
        ('{"model": {}}', "expected a class and its arguments as its 'model', but got {}"),
        (
            '{"model": "FSVAE"}',
            "expected a class and its arguments as its 'model', but got 'FSVAE'",
        ),
        (
            '{"model": {"_target_": "sj_taid.TAID", "T": 4, "_partial_": true}}',
            "expected a class and its arguments as its 'model'",
        ),
        (
            '{"model": {"_target_": "sj_taid.TAID"}, "sha256": 11}',
            "expected 64 hexadecimal digits as its 'sha256', but got 11",
        ),
        (
            '{"model": {"_target_": "sj_taid.TAID"}, "sha256": "%s"}' % ("0" * 64),
            "expected those of a run as its 'metrics', but got None",
        ),
    ],
)
def test_a_damaged_config_is_an_error(folder, text, message):
    (folder / "config.json").write_text(text)
    for read in (create_model, pretrained.read_config):
        with pytest.raises(ValueError, match=rf"config\.json .*{message}.*; copy the folder anew"):
            read(folder)


def test_weights_of_another_model_are_an_error(folder):
    model = json.loads((folder / "config.json").read_text())["model"]
    change(folder, model=model | {"hidden": 7})
    with pytest.raises(ValueError, match=r"(?s)does not fit config\.json: .*size mismatch"):
        create_model(folder, pretrained=True)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "sj_taid.pretrained.os.system",
        "sj_taid.training.load_model",
        "sj_taid.create_model",
        "sj_taid.import_module",
        "sj_taid.model.fsvae.partial",
        "torch.nn.Linear",
        "sj_taid.model.typo",
        "spikingjelly.activation_based.surrogate.torch.hub.load",
        None,
    ],
)
@pytest.mark.parametrize("place", ["model", "neuron"])
def test_a_config_calls_nothing_but_models_and_neurons(folder, target, place):
    call = {"_target_": target, "_partial_": place == "neuron"}
    model = json.loads((folder / "config.json").read_text())["model"]
    change(folder, model=call if place == "model" else model | {"neuron": call})
    with pytest.raises(ValueError, match=r"config\.json names"):
        create_model(folder)


def test_modules_that_are_imported_there_are_not_meant(folder, monkeypatch):
    monkeypatch.setattr(sj_taid, "Linear", torch.nn.Linear, raising=False)
    change(folder, model={"_target_": "sj_taid.Linear"})
    with pytest.raises(ValueError, match="which sj_taid does not define"):
        create_model(folder)


@pytest.mark.parametrize(
    "changed",
    [
        {"new_argument": 1},
        {"hidden": "wide"},
        {"stages": 5},
        {"neuron": 7},
        {"T": 0.5},
        {"hidden": -1},
    ],
)
def test_a_config_of_another_version_says_so(folder, changed):
    model = json.loads((folder / "config.json").read_text())["model"]
    change(folder, model=model | changed)
    said = r"config\.json does not describe a Classifier of this version of sj-taid: .*; the card, "
    with pytest.raises(ValueError, match=said):
        create_model(folder)


@pytest.mark.parametrize("package", ["safetensors", "huggingface_hub"])
def test_a_missing_package_is_named(package, folder, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    source = folder if package == "safetensors" else "hf://me/net"
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        create_model(source, pretrained=True)
