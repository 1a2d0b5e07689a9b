"""TAID and the fixed decoder."""

import copy

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn

from sj_taid import TAID, FixedDecoder
from tests.helpers import TOLERANCE

F64 = torch.float64


def sequence(*shape):
    return torch.randn(*shape, dtype=F64)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("kernel_size", [1, 3])
@pytest.mark.parametrize("shape", [(4, 2, 5, 3, 6), (4, 2, 5)])
def test_taid_spatial_equals_the_equations(shape, kernel_size, reduce):
    taid = TAID(4, kernel_size, reduce=reduce).double()
    s = sequence(*shape)
    weight = taid.excite.weight
    assert weight.shape == (4, 4, kernel_size) and [*taid.parameters()] == [weight]
    z = s.mean((3, 4)) if s.dim() == 5 else s
    half = kernel_size // 2
    expected = torch.zeros_like(s[0])
    for t in range(4):
        for c in range(5):
            y = torch.zeros(2, dtype=F64)
            for source in range(4):
                for k in range(kernel_size):
                    if 0 <= c + k - half < 5:
                        y = y + weight[t, source, k] * z[source, :, c + k - half]
            a = y.sigmoid().view(-1, *[1] * (s.dim() - 3))
            expected[:, c] += a * s[t, :, c]
    if reduce == "mean":
        expected = expected / 4
    error = (taid(s) - expected).abs().max()
    assert error <= TOLERANCE[F64]["value"] * expected.abs().max()


def test_taid_all_equals_the_equations():
    taid = TAID(8, squeeze="all", reduction=4).double()
    first, _, last = taid.excite
    assert first.weight.shape == (2, 8) and last.weight.shape == (8, 2)
    s = sequence(8, 3, 2, 4, 4)
    z = s.mean((2, 3, 4)).t()
    a = last(first(z).relu()).sigmoid()
    expected = torch.einsum("nt,tnchw->nchw", a, s)
    error = (taid(s) - expected).abs().max()
    assert error <= TOLERANCE[F64]["value"] * expected.abs().max()


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_taid_pixel_equals_the_equations(kernel_size):
    taid = TAID(3, kernel_size, squeeze="pixel").double()
    nn.init.normal_(taid.excite.weight)
    nn.init.normal_(taid.excite.bias)
    s = sequence(3, 2, 2, 4, 5)
    half = kernel_size // 2
    expected = torch.zeros_like(s[0])
    for n in range(2):
        for c in range(2):
            z = s[:, n, c]
            z = (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt()
            z = nn.functional.pad(z, (half,) * 4)
            for t in range(3):
                for i in range(4):
                    for j in range(5):
                        window = z[:, i : i + kernel_size, j : j + kernel_size]
                        y = (taid.excite.weight[t] * window).sum() + taid.excite.bias[t]
                        gate = 2 * 0.8 ** (2 - t) * y.sigmoid()
                        expected[n, c, i, j] += gate * s[t, n, c, i, j]
    error = (taid(s) - expected).abs().max()
    assert error <= TOLERANCE[F64]["value"] * expected.abs().max()


def test_taid_pixel_starts_as_the_fixed_decoder():
    s = sequence(4, 2, 3, 5, 6)
    assert torch.allclose(TAID(4, 3, squeeze="pixel").double()(s), FixedDecoder(4)(s))


def test_taid_pixel_needs_pixels():
    with pytest.raises(ValueError, match=r"squeeze='pixel' weighs the pixels.*got \[4, 2, 5\]"):
        TAID(4, squeeze="pixel")(torch.rand(4, 2, 5))


@pytest.mark.parametrize("squeeze", ["spatial", "all", "pixel"])
def test_taid_of_an_empty_batch(squeeze):
    x_seq = torch.zeros(4, 0, 3, 5, 6, requires_grad=True)
    image = TAID(4, squeeze=squeeze)(x_seq)
    assert image.shape == (0, 3, 5, 6)
    image.sum().backward()
    assert x_seq.grad.shape == x_seq.shape


@pytest.mark.parametrize(
    ("squeeze", "shape"), [("spatial", (3, 1, 1)), ("all", (1, 1, 1)), ("pixel", (3, 5, 5))]
)
def test_taid_attention_is_the_weight_in_the_sum(squeeze, shape):
    taid = TAID(4, squeeze=squeeze).double()
    s = sequence(4, 2, 3, 5, 5)
    a = taid.attention(s)
    a = a[..., None, None] if squeeze != "pixel" else a
    assert a.shape == (4, 2, *shape)
    assert ((a > 0) & (a < (2 if squeeze == "pixel" else 1))).all()
    torch.testing.assert_close(taid(s), (a * s).sum(0))


@pytest.mark.parametrize("squeeze", ["spatial", "all", "pixel"])
def test_taid_gradcheck(squeeze):
    taid = TAID(4, squeeze=squeeze).double()
    assert torch.autograd.gradcheck(taid, sequence(4, 2, 3, 2, 2).requires_grad_())


def test_fixed_decoder_weighs_later_steps_more():
    s = sequence(5, 2, 3, 4, 4)
    expected = sum(0.8 ** (4 - t) * s[t] for t in range(5))
    decoder = FixedDecoder(5).double()
    error = (decoder(s) - expected).abs().max()
    assert error <= TOLERANCE[F64]["value"] * expected.abs().max()
    torch.testing.assert_close(FixedDecoder(5, reduce="mean").double()(s), expected / 5)
    assert not decoder.state_dict() and decoder.attention(s).shape == (5, 1, 1)


@pytest.mark.parametrize("make", [TAID, FixedDecoder])
def test_decoders_are_multi_step_modules(make):
    net = nn.Sequential(make(4))
    functional.set_step_mode(net, "m")
    functional.reset_net(net)
    with pytest.raises(ValueError, match="step_mode"):
        net[0].step_mode = "s"
    assert torch.equal(copy.deepcopy(net)(torch.ones(4, 1, 1)), net(torch.ones(4, 1, 1)))


@pytest.mark.parametrize("make", [TAID, FixedDecoder])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoders_half_precision(make, dtype):
    assert make(4).to(dtype)(torch.rand(4, 2, 3, 4, 4, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("squeeze", ["spatial", "all"])
def test_taid_input_of_another_dtype(squeeze):
    taid = TAID(4, squeeze=squeeze)
    x_seq = torch.rand(4, 2, 3, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"float32.* torch\.bfloat16; convert one: x_seq\.to"):
        taid(x_seq)
    with torch.autocast("cpu", torch.bfloat16):
        assert taid(x_seq).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [TAID, FixedDecoder])
def test_decoders_bad_input(make):
    name = make.__name__
    with pytest.raises(ValueError, match=rf"{name} was made for T=4 time steps, but got T=5"):
        make(4)(torch.ones(5, 2, 3, 4, 4))
    with pytest.raises(ValueError, match=rf"{name} needs \[T, N, C, H, W\] or \[T, N, C\]"):
        make(4)(torch.ones(4, 2, 3, 4))
    with pytest.raises(TypeError, match="floating-point"):
        make(4)(torch.ones(4, 2, 3, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"T": 0}, "T must be"),
        ({"T": True}, "T must be"),
        ({"T": 4, "squeeze": "time"}, "squeeze must be 'spatial', 'all' or"),
        ({"T": 4, "reduce": "max"}, "reduce must be 'sum' or 'mean'"),
        ({"T": 4, "kernel_size": 2}, "odd"),
        ({"T": 4, "kernel_size": 3, "squeeze": "all"}, "averages away"),
        ({"T": 4, "reduction": 0}, "reduction must be"),
    ],
)
def test_taid_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        TAID(**options)


@pytest.mark.parametrize("decay", [0.0, 1.5])
def test_fixed_decoder_bad_decay(decay):
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\]"):
        FixedDecoder(4, decay)
