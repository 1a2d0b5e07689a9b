"""TAID and the fixed decoder."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn
from torch.nn.functional import pad

from sj_taid import TAID, FixedDecoder
from tests.helpers import TOLERANCE

F64 = torch.float64
SQUEEZES = ("spatial", "all", "pixel")
MAKES = pytest.mark.parametrize("make", [TAID, FixedDecoder])


def sequence(*shape):
    return torch.randn(*shape, dtype=F64)


def attention(taid, s):
    """The weights by their equations, with windows for convolutions: ``[T, N, C, H, W]``."""
    if taid.squeeze == "all":
        first, _, last = taid.excite
        z = s.flatten(2).mean(2).t()
        a = last(first(z).relu()).sigmoid().t()[..., None]
    elif taid.squeeze == "spatial":
        z = s.flatten(3).mean(3) if s.dim() == 5 else s
        a = torch.einsum("tsk,snc->tnc", taid.excite.weight, z).sigmoid()
    else:
        variance, mean = torch.var_mean(s, (0, 3, 4), correction=0, keepdim=True)
        windows = pad((s - mean) / (variance + 1e-5).sqrt(), (1, 1, 1, 1))
        windows = windows.unfold(3, 3, 1).unfold(4, 3, 1)
        a = torch.einsum("tsij,snchwij->nchwt", taid.excite.weight, windows)
        decay = 0.8 ** torch.arange(taid.T - 1, -1, -1, dtype=F64)
        a = (2 * decay * (a + taid.excite.bias).sigmoid()).permute(4, 0, 1, 2, 3)
    return a.view(*a.shape, *[1] * (s.dim() - a.dim()))


@pytest.mark.parametrize("shape", [(8, 2, 5, 3, 6), (8, 2, 5)])
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_taid_equals_the_equations(squeeze, shape):
    taid = TAID(8, squeeze).double()
    s = sequence(*shape)
    if squeeze == "pixel" and s.dim() == 3:
        with pytest.raises(ValueError, match=r"squeeze='pixel' weighs the pixels.*got \[8, 2, 5\]"):
            taid(s)
        return
    for parameter in taid.parameters():
        nn.init.normal_(parameter)
    a = attention(taid, s)
    expected = (a * s).sum(0)
    error = (taid(s) - expected).abs().max()
    assert error <= TOLERANCE[F64]["value"] * expected.abs().max()
    assert torch.allclose(taid.attention(s).view(a.shape), a)


def test_taid_parameters():
    shapes = [[tuple(p.shape) for p in TAID(8, squeeze).parameters()] for squeeze in SQUEEZES]
    assert shapes == [[(8, 8, 1)], [(2, 8), (2,), (8, 2), (8,)], [(8, 8, 3, 3), (8,)]]


def test_taid_pixel_starts_as_the_fixed_decoder():
    s = sequence(4, 2, 3, 5, 6)
    assert torch.allclose(TAID(4, squeeze="pixel").double()(s), FixedDecoder(4)(s))


@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_taid_gradcheck(squeeze):
    taid = TAID(4, squeeze=squeeze).double()
    for n in (2, 0):  # an empty batch too
        assert torch.autograd.gradcheck(taid, sequence(4, n, 3, 2, 2).requires_grad_())


def test_fixed_decoder_weighs_later_steps_more():
    s = sequence(5, 2, 3, 4, 4)
    expected = sum(0.8 ** (4 - t) * s[t] for t in range(5))
    decoder = FixedDecoder(5).double()
    error = (decoder(s) - expected).abs().max()
    assert error <= TOLERANCE[F64]["value"] * expected.abs().max()
    assert not decoder.state_dict() and decoder.attention(s).shape == (5, 1, 1)
    half = FixedDecoder(5, scale=0.5).double()
    assert torch.equal(half(s), 0.5 * decoder(s)) and "scale=0.5" in repr(half)


@MAKES
def test_decoders_are_multi_step_modules(make):
    net = nn.Sequential(make(4))
    functional.set_step_mode(net, "m")
    functional.reset_net(net)
    with pytest.raises(ValueError, match="step_mode"):
        net[0].step_mode = "s"
    assert torch.equal(copy.deepcopy(net)(torch.ones(4, 1, 1)), net(torch.ones(4, 1, 1)))


@MAKES
def test_decoders_half_precision(make):
    for dtype in (torch.float16, torch.bfloat16):
        assert make(4).to(dtype)(torch.rand(4, 2, 3, 4, 4, dtype=dtype)).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert make(4)(torch.rand(4, 2, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


@MAKES
def test_decoders_bad_input(make):
    name = make.__name__
    with pytest.raises(ValueError, match=rf"{name} was made for T=4 time steps, but got T=5"):
        make(4)(torch.ones(5, 2, 3, 4, 4))
    with pytest.raises(ValueError, match=rf"{name} needs \[T, N, C, H, W\] or \[T, N, C\]"):
        make(4)(torch.ones(4, 2, 3, 4))
    with pytest.raises(TypeError, match="floating-point"):
        make(4)(torch.ones(4, 2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (TAID, {"T": 0}, "T must be"),
        (TAID, {"squeeze": "time"}, "squeeze must be 'spatial', 'all' or 'pixel'"),
        (FixedDecoder, {"decay": 0.0}, r"decay must be in \(0, 1\]"),
        (FixedDecoder, {"scale": None}, "scale must be a number"),
    ],
)
def test_decoders_bad_arguments(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**{"T": 4} | options)
