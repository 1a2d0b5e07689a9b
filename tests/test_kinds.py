"""Kinds of values: annotations and defaults say what a class takes, wherever they stand."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Optional

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from spikingjelly.activation_based import neuron, surrogate

from sj_taid import ALIFNode
from sj_taid._kinds import check_kinds, rule_of

VALUES = [
    *(None, True, False, 0, 1, -3, 2**62, 10**20, 0.0, 1.5, float("inf"), float("nan")),
    *("", "x", "1", "yes", [], [1], [1.0], ["x"], [[1]], [True], {}, {"x": 1}, {"_target_": "x"}),
]
NUMBERS = [0, 1, -3, 2**62, 10**20, 0.0, 1.5, float("inf")]
INTEGERS, FLAGS, TEXTS = [0, 1, -3, 2**62], [True, False], ["", "x", "1", "yes"]
DICTIONARIES = [{}, {"x": 1}, {"_target_": "x"}]
TAKEN = {
    bool: FLAGS,
    int: INTEGERS,
    float: NUMBERS,
    str: TEXTS,
    Path: ["x", "1", "yes"],
    str | Path: ["x", "1", "yes"],
    str | int: [*TEXTS, *INTEGERS],
    Optional[float]: [None, *NUMBERS],  # noqa: UP045
    Literal["x", 1, None]: ["x", 1, None],
    Literal[False] | Path | None: [None, False, "x", "1", "yes"],
    int | Sequence[int]: [*INTEGERS, [], [1]],
    Iterable[Sequence[int]]: [[], [[1]]],
    tuple[float, float]: [[], [1], [1.0]],
    tuple[str, ...]: [[], ["x"]],
    list[Any]: [value for value in VALUES if isinstance(value, list)],
    Mapping[str, Any]: DICTIONARIES,
    dict[str, int] | None: [None, *DICTIONARIES],
    float | torch.Tensor: NUMBERS,
    torch.nn.Module: [None, *TEXTS, {"_target_": "x"}],
    Callable[..., int]: [None, *TEXTS, {"_target_": "x"}],
}


@pytest.mark.parametrize("kind", TAKEN, ids=str)
def test_rule_of(kind):
    expected, holds = rule_of(kind)
    assert expected and list(map(repr, filter(holds, VALUES))) == [
        repr(value) for value in VALUES if repr(value) in map(repr, TAKEN[kind])
    ]


@pytest.mark.parametrize("kind", [Any, Any | None, Callable[..., Any] | Any, type, "int", list])
def test_rule_of_what_says_nothing(kind):
    assert rule_of(kind) is None


@dataclass(kw_only=True)
class Base:
    size: int
    share: float = 0.5


class Derived(Base):
    pass


class Swallows:
    def __init__(self, *, name: str, scale=1.0, spiking=True, other="x", **kwargs: Any):
        pass


class Passes(Swallows):
    def __init__(self, depth: "int" = None, **kwargs):  # noqa: RUF013
        super().__init__(**kwargs)


class Unresolved:
    def __init__(self, depth: "NotImported", flag=True):  # noqa: F821
        pass


def function(rate: float, folder: Path | None = None):
    pass


@pytest.mark.parametrize(
    ("target", "good", "wrong"),
    [
        (Derived, {"size": 3, "share": 1}, {"size": 3.0, "share": "x"}),
        (
            Passes,
            {"name": "x", "depth": None, "scale": 2, "spiking": False, "other": 3, "unknown": {}},
            {"name": 3, "depth": "x", "scale": True, "spiking": 1},
        ),
        (Unresolved, {"depth": "x", "flag": False}, {"flag": "no"}),
        (function, {"rate": 1, "folder": None}, {"rate": "x", "folder": ""}),
        (ALIFNode, {"init_tau": 2, "channels": None}, {"init_tau": None, "channels": 2.0}),
        (neuron.LIFNode, {"tau": 2.0, "v_reset": None}, {"tau": "2", "detach_reset": 0}),
        (surrogate.ATan, {"alpha": 2.0}, {"alpha": [2.0], "spiking": "yes"}),
        (torch.optim.Adam, {"lr": 1, "betas": [0.9, 0.99]}, {"lr": "x", "betas": 0.9, "eps": []}),
        (torch.nn.CrossEntropyLoss, {"weight": torch.ones(2)}, {"weight": [1.0], "reduction": 1}),
        (EarlyStopping, {"monitor": "x", "patience": 3}, {"monitor": 3, "strict": "on"}),
    ],
)
def test_check_kinds(target, good, wrong):
    check_kinds(target, good)
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=rf"^part\.{name} must be .+, but it is ") as refused:
            check_kinds(target, {**good, name: value}, "part.")
        assert str(refused.value).endswith(repr(value))
