"""What docs/comparison.md says of other libraries is so."""

import pytest
import torch
from spikingjelly.activation_based import neuron, surrogate

from sj_taid import ALIFNode, _compat


def parameters(module):
    return {name: tuple(p.shape) for name, p in module.named_parameters()}


@pytest.mark.skipif(not _compat.FUNCTIONAL_STATES, reason="the page tells of SpikingJelly 2.x")
def test_spikingjelly():
    assert parameters(neuron.ParametricLIFNode()) == {"w": ()}
    gated = neuron.GatedLIFNode(T=4, inplane=3)
    assert "v_threshold" in parameters(gated) and len(parameters(gated)) == 8
    for other in (neuron.DSRIFNode, neuron.DSRLIFNode):
        assert parameters(other()) == {"v_threshold": ()}
    with pytest.raises(IndexError):
        gated(torch.rand(3, 2, 3, 5, 5))


def test_snntorch_has_the_same_spikes_and_gradients():
    snntorch = pytest.importorskip("snntorch", reason="needs snnTorch: pip install snntorch")
    beta, threshold = 0.75, 0.8
    theirs = snntorch.Leaky(
        beta=torch.tensor(beta),
        threshold=torch.tensor(threshold),
        spike_grad=snntorch.surrogate.atan(alpha=2.0),
        learn_beta=True,
        learn_threshold=True,
        init_hidden=True,
        reset_mechanism="zero",
    )
    ours = ALIFNode(
        init_tau=1 / (1 - beta),
        decay_input=False,
        v_threshold=threshold,
        surrogate_function=surrogate.ATan(2.0),
        detach_reset=True,
        step_mode="m",
        backend="torch",
    )
    x_seq, weight = 1.5 * torch.rand(16, 64, 8), torch.rand(16, 64, 8)
    spikes, expected = ours(x_seq), torch.stack([theirs(x) for x in x_seq])
    assert torch.equal(spikes, expected) and 0.1 < spikes.mean() < 0.9
    ((spikes + expected) * weight).sum().backward()
    torch.testing.assert_close(ours.v_threshold.grad, theirs.threshold.grad)
    # beta = 1 - sigmoid(w), so d beta / d w = -beta (1 - beta)
    torch.testing.assert_close(ours.w.grad, -beta * (1 - beta) * theirs.beta.grad)
    assert snntorch.Leaky(beta=1.5)(torch.ones(1), torch.ones(1))[1] == 2  # beta counts as 1
    assert snntorch.Leaky(beta=0.5)(torch.ones(1))[0] == 0  # at the threshold it does not fire


def test_norse_has_the_same_spikes_and_no_parameters():
    norse = pytest.importorskip("norse.torch", reason="needs norse: pip install norse")
    threshold = torch.nn.Parameter(torch.tensor(0.5))
    theirs = norse.LIFBoxCell(
        p=norse.LIFBoxParameters(tau_mem_inv=torch.tensor(250.0), v_th=threshold)
    )
    assert not list(theirs.parameters()) and not list(norse.LIFCell().parameters())
    ours = ALIFNode(init_tau=4.0, v_threshold=0.5, step_mode="m", backend="torch")
    x_seq, state, expected = 2 * torch.rand(16, 64, 8), None, []
    for x in x_seq:
        spike, state = theirs(x, state)
        expected.append(spike)
    spikes = ours(x_seq)
    assert torch.equal(spikes, torch.stack(expected)) and 0.1 < spikes.mean() < 0.9
    spike.sum().backward()
    assert threshold.grad != 0
