"""Kinds of values: annotations and flags say what a class takes, wherever they stand."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from sj_taid import ALIFNode
from sj_taid._internal.kinds import Seed, check_kinds, declared_kinds


@dataclass(kw_only=True)
class Base:
    size: int
    share: float = 0.5
    folder: Path | None = None
    seed: Seed = 0


class Derived(Base):
    pass


class Swallows:
    def __init__(self, *, name: str, spiking=True, other="x", **kwargs: Any):
        pass


class Passes(Swallows):
    def __init__(self, depth: "int" = None, **kwargs):  # noqa: RUF013
        super().__init__(**kwargs)


def make(size: int, *, flag=True):
    pass


class Unresolved:
    def __init__(self, depth: "NotImported", flag=True):  # noqa: F821
        pass


@pytest.mark.parametrize(
    ("target", "good", "wrong"),
    [
        (
            Derived,
            {"size": 3, "share": 1, "folder": None},
            {"size": 3.0, "share": "x", "folder": 3, "seed": -1},
        ),
        (
            Passes,
            {"name": "x", "depth": None, "spiking": False, "other": 3, "unknown": {}},
            {"name": 3, "depth": "x", "spiking": 1},
        ),
        (make, {"size": 3, "flag": False}, {"size": "x", "flag": 1}),
        (Unresolved, {"depth": "x", "flag": False}, {"flag": "no"}),
        (ALIFNode, {"init_tau": 2, "channels": None}, {"v_threshold": "1", "channels": 2.0}),
        (
            torch.optim.Adam,
            {"lr": 1, "weight_decay": 2**40, "betas": [0.9, 0.99]},
            {"lr": float("nan"), "weight_decay": float("inf"), "betas": [0.9, float("nan")]},
        ),
        (
            torch.nn.CrossEntropyLoss,
            {"weight": torch.ones(2)},
            {"label_smoothing": "x", "reduction": 1},
        ),
    ],
)
def test_check_kinds(target, good, wrong):
    kinds = declared_kinds(target)
    check_kinds(kinds, good)
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"^part\.{name}: .+, but it is ") as refused:
            check_kinds(kinds, {**good, name: value}, "part.")
        assert str(refused.value).endswith(repr(value))
