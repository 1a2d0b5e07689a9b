"""What the README promises of a net, by public names alone; and the Python of all pages."""

import re
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

import sj_taid

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
X_SEQ = torch.rand(8, 2, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def make_net():
    torch.manual_seed(0)
    options = {"v_threshold": 0.5, "surrogate_function": surrogate.ATan()}
    net = nn.Sequential(
        layer.Conv2d(2, 8, 3, padding=1),
        layer.BatchNorm2d(8),
        neuron.ParametricLIFNode(**options),
        layer.Conv2d(8, 8, 3, padding=1),
        layer.BatchNorm2d(8),
        neuron.LIFNode(**options),
        layer.Flatten(),
        layer.Linear(8 * 8 * 8, 5),
    )
    functional.set_step_mode(net, "m")
    return net


def train(net):
    """The outputs and every gradient of a step, by name."""
    with sj_taid.fresh_state(net):
        outputs = net(X_SEQ)
        outputs.square().sum().backward()
    return {"outputs": outputs.detach()} | {n: p.grad for n, p in net.named_parameters()}


def test_accelerate_saves_memory_and_keeps_outputs_gradients_and_checkpoints():
    plain, net = make_net(), make_net()
    report = sj_taid.accelerate(net, X_SEQ)
    before, after = report.saved_bytes
    assert after < before / 2
    torch.testing.assert_close(train(net), train(plain), rtol=1e-3, atol=1e-4)
    make_net().load_state_dict(net.state_dict())
    sj_taid.unaccelerate(net)
    assert [type(module) for module in net] == [type(module) for module in plain]


def read(path):
    return path.read_text(encoding="utf-8")


TEXTS = {page.stem: read(page) for page in PAGES}


def blocks(language):
    """Those of README and docs."""
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name, text in TEXTS.items()
        for number, block in enumerate(re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("python"))
def test_python_block_runs_alone(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "block", "exec"), {"__name__": "block"})
