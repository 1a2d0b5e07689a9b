"""Models by name: each of the package works and has a complete card; errors of other models."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from sj_taid import create_model, list_models, pretrained
from sj_taid.nets.modules import AcceleratedALIF

safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")

PACKAGE = Path(pretrained.__file__).parent
NAMES = list_models()
NAME = "classifier_digits_alif"
MEGABYTE = 2**20


@pytest.fixture
def folder(tmp_path):
    """A copy of a model, to be changed."""
    return Path(shutil.copytree(PACKAGE / NAME, tmp_path / "model"))


def change(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def change_model(folder, **arguments):
    model = json.loads((folder / "config.json").read_text())["model"]
    change(folder, model=model | arguments)


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_create_model_of_the_package(name):
    model = create_model(name, pretrained=True)
    assert not model.training
    assert any(isinstance(module, AcceleratedALIF) for module in model.modules())
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
def test_card_is_complete(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the card's code saves a picture
    paths = sorted((PACKAGE / name).iterdir())
    assert [path.name for path in paths] == ["README.md", "config.json", "model.safetensors"]
    assert sum(path.stat().st_size for path in paths) <= 5 * MEGABYTE
    assert sum(path.stat().st_size for path in PACKAGE.glob("*/*")) <= 15 * MEGABYTE
    card, config = (path.read_text(encoding="utf-8") for path in paths[:2])
    for text in (card, config):
        assert not re.search(r"(?<![\w.)])[~.]?/\w|file:", text), "a path of the author's"
    metrics = json.loads(config)["metrics"]
    assert f"Trained by `{metrics['command']}`." in card
    assert {"epochs", "seed", "versions", "machine"} <= metrics.keys()
    assert re.fullmatch(r"[0-9a-f]{12}", metrics["commit"]), "of a clean checkout"
    assert re.search(r"^\| .+ [↑↓] \| [\d.]+ \| .+ \|$", card, re.M), "a metric"
    assert re.search(r"^license: mit$", card, re.M)
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.M | re.S)
    exec(compile(code, name, "exec"), {})


def test_create_model_from_a_folder(folder):
    states = [create_model(source, pretrained=True).state_dict() for source in (folder, NAME)]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    with pytest.raises(ValueError, match=f"give a folder of save_model, or .*{NAME}"):
        create_model("typo")


@pytest.mark.parametrize("text", ["[]", "", '{"model": {}}', '{"sha256": ""}'])
def test_config_of_another_program(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json describes no model of sj-taid: "):
        create_model(folder)


def test_weights_that_do_not_fit(folder):
    weights = folder / "model.safetensors"
    for state, said in (
        ({"x": torch.zeros(3)}, r"Unexpected key\(s\).* \"x\""),
        ({}, "Missing key"),
    ):
        safetensors.save_file(state, weights)
        said_first = rf"is damaged or of another model: its SHA-256 is {digest(folder)}, not "
        with pytest.raises(ValueError, match=said_first):
            create_model(folder, pretrained=True)
        change(folder, sha256=digest(folder))
        with pytest.raises(ValueError, match=f"is of another model than its config.json: {said}"):
            create_model(folder, pretrained=True)
    weights.write_bytes(b"x" * 100)
    change(folder, sha256=digest(folder))
    with pytest.raises(ValueError, match=r"model\.safetensors is no file of safetensors: "):
        create_model(folder, pretrained=True)
    weights.unlink()
    with pytest.raises(ValueError, match=r"no weights at .*; copy the whole folder"):
        create_model(folder, pretrained=True)


@pytest.mark.parametrize("thresholds", [None, [1], {"head.2": "x"}, {"nowhere": 1.0}])
def test_fixed_thresholds_that_do_not_fit(folder, thresholds):
    change(folder, fixed_thresholds=thresholds)
    with pytest.raises(ValueError, match=r"is of another model than its config\.json: "):
        create_model(folder, pretrained=True)


@pytest.mark.parametrize(
    "target", ["os.system", "sj_taid.create_model", "sj_taid.model.typo", "torch.nn.Linear", None]
)
def test_config_calls_nothing_but_models_and_neurons(folder, target):
    said = rf"config\.json describes no model .*: the config names {target!r}: .* anything$"
    change_model(folder, neuron={"_target_": target, "_partial_": True})
    with pytest.raises(ValueError, match=said):
        create_model(folder)
    change(folder, model={"_target_": target})
    with pytest.raises(ValueError, match=said):
        create_model(folder)


@pytest.mark.parametrize(
    "changed", [{"new_argument": 1}, {"hidden": -1}, {"neuron": 7}, {"_partial_": True}]
)
def test_config_of_another_version(folder, changed):
    change_model(folder, **changed)
    with pytest.raises(ValueError, match=r"config\.json describes no model of this ver") as raised:
        create_model(folder)
    assert "\n" not in str(raised.value)


def build_with(name, **arguments):
    """A model of the package, untrained, with other arguments."""
    return pretrained.build(pretrained.read_config(name)["model"] | arguments)


@pytest.mark.parametrize("there", ["flow", "learned"])
@pytest.mark.parametrize("here", ["flow", "learned"])
def test_start_from_a_model_with_or_without_a_flow(there, here, tmp_path):
    name = "esvae_mnist_taid"
    folder = Path(shutil.copytree(PACKAGE / name, tmp_path / "model"))
    weights = folder / "model.safetensors"
    trained = safetensors.load_file(weights)
    if there == "learned":
        trained = {k: v for k, v in trained.items() if not k.startswith("flow.")}
        safetensors.save_file(trained, weights)
        change_model(folder, sample_from="learned")
        change(folder, sha256=digest(folder))
    model = build_with(name, sample_from=here)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    pretrained.start_from(model, folder)
    for key, value in model.state_dict().items():
        assert torch.equal(value, (before if key.startswith("flow.") else trained)[key]), key


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("esvae_mnist_taid", {"latent_channels": 96}, r"size mismatch for .*\[1024, 128\]"),
        ("classifier_digits_alif", {"image_size": 16}, "size mismatch for head"),
        ("fsvae_digits_taid", {"subpixel": True}, r"Unexpected key\(s\) .*decoder|size mismatch"),
    ],
)
def test_start_from_refuses_other_layers(name, arguments, message):
    model = build_with(name, **arguments)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"start_from={name} has other layers; choose.*{message}"):
        pretrained.start_from(model, name)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
