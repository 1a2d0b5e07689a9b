"""The flow: its fit, and the rates that it draws."""

import pytest
import torch
from torch import nn

from sj_taid.model import flow
from sj_taid.model.flow import FlowPrior


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(flow, "WIDTH", 32)
    monkeypatch.setattr(flow, "BLOCKS", 2)
    monkeypatch.setattr(flow, "LR", 5 * flow.LR)


def bent(n=1000):
    """Rates whose third channel depends on how far the first is from 1/2: no Gaussian's ranks."""
    rates = torch.rand(n, 3)
    rates[:, 2] = 0.9 * (2 * rates[:, 0] - 1).abs() + 0.1 * rates[:, 2]
    return rates


class Field(nn.Module):
    """A velocity that is known, in place of the network; keeps what it was asked."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity = velocity
        self.asked = []

    def forward(self, *arguments):
        self.asked.append(arguments)
        return self.velocity(*arguments)


def test_draw_integrates_the_velocity(monkeypatch):
    prior, z = FlowPrior(3, levels=4).double(), torch.rand(400, 3).double()
    prior.shares[1], prior.shares[3] = 0.25, 0.75
    prior.velocity = Field(lambda x, time, index: 2 * time - index[:, None])  # x(1) = z + 1 - k
    monkeypatch.setattr(torch, "randn", lambda *shape: z)
    x = prior.draw(400)
    index = prior.velocity.asked[0][2]
    assert (index == 3).float().mean().item() == pytest.approx(0.75, abs=0.1)
    assert {*index.tolist()} == {1, 3}
    torch.testing.assert_close(x, z + 1 - index[:, None])
    prior.velocity = Field(lambda x, time, index: x)  # x(1) = e z, by 8 steps of second order
    x = prior.draw(400)
    torch.testing.assert_close(x, (1 + 1 / 8 + 1 / 128) ** 8 * z)
    assert len(prior.velocity.asked) == 16


def test_loss_is_the_error_of_the_velocity_on_straight_lines(monkeypatch):
    prior, noise = FlowPrior(2, levels=2), torch.randn(8, 2)
    scores, index = torch.randn(8, 2), torch.arange(8)
    monkeypatch.setattr(prior, "draw_scores", lambda levels: scores)
    monkeypatch.setattr(torch, "randn_like", lambda x: noise)
    prior.velocity = Field(lambda x, time, index: 3 * x)
    loss = prior.loss(torch.zeros(8, 2).long(), index)
    x, time, asked = prior.velocity.asked[0]
    torch.testing.assert_close(x, (1 - time) * noise + time * scores)
    torch.testing.assert_close(loss, (3 * x - (scores - noise)).square().mean())
    assert [*(8 * time).floor()[:, 0].sort().values] == [*range(8)] and asked is index


def weight(prior):
    return prior.velocity.last.weight


def test_flow_draws_the_class_that_is_asked_for():
    labels = torch.tensor([7, 7, 7, 2, 2, 4]).repeat(100)
    centers = {2: 0.0, 4: 0.6, 7: 0.3}
    rates = 0.05 * torch.rand(600, 3)
    rates += torch.tensor([centers[label] for label in labels.tolist()])[:, None]
    prior = FlowPrior(3, levels=100)
    prior.fit(rates, labels.tolist(), epochs=15)
    assert prior.classes == [2, 4, 7] and prior.labels[3:].unique().tolist() == [-1]

    def nearest(rates):
        return (rates.mean(1, keepdim=True) - torch.tensor([*centers.values()])).abs().argmin(1)

    asked = torch.tensor([2, 4, 7]).repeat(300)
    hits = nearest(prior(900, asked)) == torch.arange(3).repeat(300)
    assert hits.float().mean() > 0.9
    shares = nearest(prior(900)).bincount(minlength=3) / 900
    assert shares.tolist() == pytest.approx([1 / 3, 1 / 6, 1 / 2], abs=0.1)


def test_ranks_are_between_those_of_the_neighbours():
    prior = FlowPrior(2, levels=2)
    prior.cumulative.copy_(torch.tensor([[0.5, 0.75, 1.0]]))  # of the levels 0, 0, 1, 2
    levels = torch.tensor([[0, 0], [1, 1], [2, 2]]).repeat(1000, 1)
    rank = torch.special.ndtr(prior.draw_scores(levels))[:, 0].view(1000, 3)
    for column, (low, high) in zip(rank.T, ((0, 0.5), (0.5, 0.75), (0.75, 1)), strict=True):
        assert low <= column.min() < low + 0.01 and high - 0.01 < column.max() <= high


def test_flow_draws_what_no_gaussian_has():
    prior = FlowPrior(3, levels=100)
    assert not prior.fitted
    prior.fit(bent(), epochs=10)
    assert prior.fitted and prior.classes == []
    drawn = prior(4000)
    assert torch.allclose(drawn.mean(0), torch.full((3,), 0.5), atol=0.08)
    distance = (2 * drawn[:, 0] - 1).abs()
    related, unrelated = torch.corrcoef(torch.stack([distance, drawn[:, 2], drawn[:, 1]]))[0, 1:]
    assert related > 0.8 and unrelated.abs() < 0.15
    assert not any(parameter.requires_grad for parameter in prior.parameters())


def test_fit_depends_on_the_seed_alone_and_is_in_the_state_dict():
    rates = bent(100).round()
    first, again, other, loaded = (FlowPrior(3, levels=10).double() for _ in range(4))
    for number, (prior, seed) in enumerate(((first, 0), (again, 0), (other, 1))):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        with torch.no_grad():
            prior.fit(rates, seed=seed, epochs=2)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(weight(first), weight(again))
    assert not torch.equal(weight(first), weight(other))
    loaded.load_state_dict(first.state_dict())
    drawn = []
    for prior in (first, loaded):
        torch.manual_seed(0)
        drawn.append(prior(500))
    assert torch.equal(*drawn) and drawn[0].dtype == torch.float64
    assert drawn[0].unique().tolist() == [0, 1] and loaded(0).shape == (0, 3)
    loaded.clear()
    assert not loaded.fitted


def test_fit_refuses_what_it_cannot_fit():
    prior, rates = FlowPrior(2), torch.rand(50, 2)
    for given, labels, message in (
        (rates[:4], None, "at least 10 images, but got 4"),
        (rates + 1, None, "probabilities"),
        (torch.rand(50, 3), None, "expected rates"),
        *((rates, bad, "labels") for bad in ([0], [-1] * 50, [0.5] * 50, range(50))),
    ):
        with pytest.raises(ValueError, match=message):
            prior.fit(given, labels)
    with pytest.raises(ValueError, match="epochs must be an integer >= 1"):
        prior.fit(rates, epochs=0)
    with pytest.raises(ValueError, match="not fitted"):
        prior(3)


def test_fit_that_diverges_changes_nothing(monkeypatch):
    prior = FlowPrior(3, levels=10)
    prior.fit(bent(100), epochs=2)
    before = {name: tensor.clone() for name, tensor in prior.state_dict().items()}
    nan = torch.tensor(float("nan"), requires_grad=True)
    monkeypatch.setattr(FlowPrior, "loss", lambda *_: nan * 1)
    with pytest.raises(FloatingPointError, match="diverged"):
        prior.fit(bent(200), epochs=2)
    for name, tensor in prior.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_best_epoch_counts(monkeypatch):
    held_out, states, loss = iter([3.0, 1.0, 2.0, 2.0, 1.5]), [], FlowPrior.loss

    def measure(self, *levels):
        if torch.is_grad_enabled():
            return loss(self, *levels)
        states.append(weight(self).clone())
        return torch.tensor(next(held_out))

    monkeypatch.setattr(FlowPrior, "loss", measure)
    prior = FlowPrior(3, levels=10)
    prior.fit(bent(100), epochs=5)
    assert len(states) == 5
    assert torch.equal(weight(prior), states[1])


def test_held_out_images_are_not_trained_on_unless_a_class_has_no_others(monkeypatch):
    monkeypatch.setattr(flow, "LR", 0.0)
    monkeypatch.setattr(torch, "randperm", torch.arange)  # the first tenth is held out
    trained, held_out, losses, loss = set(), [], set(), FlowPrior.loss

    def measure(self, levels, index):
        value, rows = loss(self, levels, index), [row[0] for row in levels.tolist()]
        if torch.is_grad_enabled():
            trained.update(rows)
        else:
            held_out.append(rows)
            losses.add(value.item())
        return value

    monkeypatch.setattr(FlowPrior, "loss", measure)
    rates = (torch.arange(100) / 100)[:, None].repeat(1, 2)  # all differ
    prior = FlowPrior(2, levels=100)
    # Fifty images and their mirror images.
    prior.fit(rates.view(50, 2, 2), [2, 0, 1, *[0, 1] * 23, 1], epochs=2)
    assert {*held_out[0]} == {*range(10)} and len(held_out[0]) >= 1024
    assert trained == {*range(100)} - {*range(2, 10)}
    assert held_out[0] == held_out[1] and len(losses) == 1  # the same noise


def test_half_precision_in_inference_mode():
    rates = torch.rand(200, 64).clamp(0.2, 1)
    rates[:, 0] = 1
    prior = FlowPrior(64, levels=8)
    with torch.inference_mode():
        prior.fit(rates.bfloat16(), epochs=2)
        drawn = prior.bfloat16()(2000)
    assert drawn.dtype == torch.bfloat16 and drawn.min() > 0 and (drawn[:, 0] == 1).all()


def test_few_rates_of_many_classes():
    labels = torch.arange(5).repeat(5)
    centers = torch.rand(5, 16).round()
    prior = FlowPrior(16, levels=8)
    prior.fit((centers[labels] + 0.1 * torch.randn(25, 16)).clamp(0, 1), labels, epochs=48)
    asked = labels.repeat(20)
    nearest = torch.cdist(prior(500, asked), centers).argmin(1)
    assert (nearest == asked).float().mean() > 0.7
