"""The decoders of experiments/attention.py: where each starts, and that none changes the rest."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from experiments.attention import Attention, Gain, Steps, refit
from sj_taid import TAID, FixedDecoder

T = 8
ARMS: dict[str, Callable[[], nn.Module]] = {
    "fixed": lambda: FixedDecoder(T),
    "gain": lambda: Gain(T),
    "mean": lambda: FixedDecoder(T, decay=1.0, scale=1 / T),
    "steps": lambda: Steps(T),
    "taid": lambda: Attention(T),
    "taid, sum 1": lambda: Attention(T, scale=2 / T),
}


@pytest.mark.parametrize("name", ARMS)
def test_random_numbers_after_a_decoder_are_the_same(name):
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    ARMS[name]()
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("name", ["gain", "steps"])
def test_a_learned_decoder_starts_as_fsvaes_and_learns(name):
    x_seq, decoder = torch.rand(T, 2, 1, 4, 4), ARMS[name]()
    image = decoder(x_seq)
    assert torch.equal(image, FixedDecoder(T)(x_seq))
    image.sum().backward()
    (parameter,) = decoder.parameters()
    assert parameter.numel() == (1 if name == "gain" else T)
    assert (parameter.grad != 0).all()


def test_attention_is_taid_times_its_scale():
    x_seq = torch.rand(T, 2, 1, 4, 4)
    torch.manual_seed(3)
    published = TAID(T)
    for scale in (1.0, 2 / T):
        torch.manual_seed(3)
        torch.testing.assert_close(Attention(T, scale)(x_seq), scale * published(x_seq))


def test_a_quarter_starts_at_a_sum_of_1():
    silent = torch.zeros(T, 1, 1, 4, 4)  # each weight is sigmoid(0)
    assert Attention(T, 2 / T).attention(silent).sum().item() == 1.0


def test_refit_takes_a_gain_and_an_offset_away():
    images = list(torch.rand(10, 1, 4, 4))
    refitted = refit(lambda x: 0.5 * x - 0.25, images, images)
    assert refitted["gain"] == pytest.approx(2, rel=1e-5)
    assert refitted["offset"] == pytest.approx(0.5, rel=1e-5)
    assert refitted["error_refitted"] == pytest.approx(0, abs=1e-12)


def test_refit_is_least_squares():
    x, noise = torch.rand(2, 200, dtype=torch.float64)
    made = dict(zip(x.tolist(), (x + noise).tolist(), strict=True))

    def model(of):
        return of.new_tensor([made[value] for value in of.tolist()])

    refitted = refit(model, [x[:50], x[50:]], [x])
    design = torch.stack([x + noise, torch.ones_like(x)], 1)
    found = torch.linalg.lstsq(design, x).solution
    expected = [*found, (design @ found - x).square().mean()]
    values = torch.tensor([*refitted.values()], dtype=torch.float64)
    torch.testing.assert_close(values, torch.stack(expected))
