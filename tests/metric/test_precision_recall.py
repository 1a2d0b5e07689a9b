"""Precision and recall of sets on a line, worked by hand."""

import pytest
import torch

from sj_taid.metric import Precision, Recall
from sj_taid.metric.precision_recall import share_near
from tests.metric.pixels import Pixels

REAL = [0.0, 1.0, 3.0, 4.0]  # the nearest other is 1 away from each
GENERATED = [0.5, 0.6, 9.0, 20.0]  # 0.1, 0.1, 8.4 and 11


def images(values):
    """Images whose features are on a line."""
    return torch.tensor(values).view(-1, 1, 1, 1) * torch.tensor([0.6, 0.0, 0.8, 0.0]).view(1, 2, 2)


def compute(metric, real, generated, batch=3):
    for part in images(real).split(batch):
        metric.update(part, real=True)
    for part in images(generated).split(batch):
        metric.update(part, real=False)
    return metric.compute().item()


def test_precision_and_recall_by_the_nearest_neighbour():
    # 0.5 and 0.6 are within 1 of a real one; 1, 3 and 4 are within 8.4 of 9, and 0 is not.
    assert compute(Precision(Pixels(), k=1), REAL, GENERATED) == 0.5
    assert compute(Recall(Pixels(), k=1), REAL, GENERATED) == 0.75


@pytest.mark.parametrize("kind", [Precision, Recall])
def test_precision_and_recall_take_as_many_of_each_kind(kind):
    line = torch.rand(600, generator=torch.Generator().manual_seed(0)).tolist()
    state = torch.random.get_rng_state()
    first = compute(kind(Pixels()), line[:500], line[500:])
    assert 0.8 < first <= 1 and first * 100 == pytest.approx(round(first * 100), abs=1e-4)
    assert compute(kind(Pixels()), line[:500], line[500:], batch=50) == first
    assert torch.equal(torch.random.get_rng_state(), state)


def spread(kind, features, size, generator):
    """Put features far from 0: all of them, in two or three groups, one alone, or along a line."""
    n = len(features)
    if kind == "all":
        return features + size
    if kind == "one":
        return torch.cat([features[:1] + size, features[1:]])
    if kind == "line":
        return features + size * torch.rand(n, 1, generator=generator)
    return features + size * torch.randint(int(kind), (n, 1), generator=generator)


def exact_distances(points, others):
    """Of differences in float64, which are exact."""
    rows = [(point.double() - others.double()).norm(dim=1) for point in points]
    return torch.stack(rows)


@pytest.mark.parametrize("size", [300.0, 1e5, 1e7])
@pytest.mark.parametrize("kind", ["all", "one", "line", "2", "3"])
def test_precision_of_features_far_from_each_other(kind, size):
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randn(1100, 24, generator=generator) for _ in range(2)]  # more than are at once
    points, others = (spread(kind, features, size, generator) for features in sets)
    radii = exact_distances(others, others).kthvalue(6).values
    expected = (exact_distances(points, others) <= radii).any(1).double().mean().item()
    assert share_near(points, others, 5).item() == pytest.approx(expected, abs=1e-6)


def test_precision_refuses_too_few_images():
    with pytest.raises(ValueError, match=r"by 4 .* at least 5 images of each kind, but got 4 real"):
        compute(Precision(Pixels(), k=4), REAL, [*GENERATED, 1.0])
    with pytest.raises(ValueError, match=r"but got 0 generated ones; add images"):
        compute(Precision(Pixels(), k=3), REAL, [])
