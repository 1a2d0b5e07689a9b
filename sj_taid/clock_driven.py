"""Run old nets: one import gives the modules, arguments and bases that they were written for.

What the import does, for the whole process:

* It adds the old modules to ``sys.modules`` and ``spikingjelly``.
* It adds to ``sys.meta_path`` a finder that finds nothing: for ``from clock_driven.x import y`` it
  says what to use in place of a ``y`` that is gone.
* On SpikingJelly 2.x, for nets of 0.0.0.0.14, it changes ``activation_based`` itself: the
  constructors of its neurons take ``backend`` and do not use it, a subclass of
  ``neuron.BaseNode`` that defines ``neuronal_charge`` runs, and ``neuron.surrogate`` and
  ``functional.set_backend`` exist.

Up to 0.0.0.0.12 SpikingJelly had ``spikingjelly.clock_driven`` and ``spikingjelly.cext.neuron``,
which most published nets import. Import this first:

>>> import sj_taid.clock_driven
>>> from spikingjelly.clock_driven import layer, neuron, surrogate
>>> neuron.MultiStepLIFNode(detach_reset=True, surrogate_function=surrogate.ATan()).step_mode
'm'

The old names stand for today's classes, or for subclasses that only fill in the defaults of then or
compute what these did, so :func:`sj_taid.accelerate` and :func:`sj_taid.swap_neurons` take them,
and a ``state_dict`` keeps its keys.

Source: SpikingJelly 0.0.0.0.12, with ``backend`` given by name; for ``cext.neuron`` 0.0.0.0.4, with
all arguments given by name.
"""

import inspect
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial, wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import encoding, functional, layer, neuron, rnn, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet, spiking_vgg
from torch import Tensor, nn
from torch.nn.functional import dropout

from ._compat import FUNCTIONAL_STATES, HOOKS

if "spikingjelly.clock_driven" in sys.modules:
    raise ImportError("import sj_taid.clock_driven before spikingjelly.clock_driven")


class _Old(nn.Module):
    """The arguments of old neurons that today's do not take, before one of today's classes."""

    _defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, backend: str = "torch", **options: Any) -> None:
        _check_backend(backend)
        options = self._defaults | options
        for unused in ("cupy_fp32_inference", "lava_s_cale"):
            options.pop(unused, None)
        chosen = options.get("surrogate_function")
        if isinstance(chosen, str):
            kind = getattr(surrogate, chosen, None)
            if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
                raise ValueError(f"surrogate_function must be a name as 'ATan', not {chosen!r}")
            alpha = {"alpha": options.pop("alpha")} if "alpha" in options else {}
            options["surrogate_function"] = kind(**alpha)
        super().__init__(*args, **options)


def _check_backend(backend: str) -> None:
    """Check a backend of then, which is not used."""
    if backend not in ("torch", "cupy"):
        raise ValueError(f"backend must be 'torch' or 'cupy', but it is {backend!r}")
    if backend == "cupy":
        _explain_cupy()


@cache
def _explain_cupy() -> None:
    """Say once that CuPy is not used."""
    message = (
        "backend='cupy' is taken and not used: the neurons are today's, which SpikingJelly runs as "
        "it sees fit. sj_taid.accelerate(net) runs them on a fused operator"
    )
    warnings.warn(message, stacklevel=4)


def _define(name: str, *bases: Any, **defaults: Any) -> Any:
    """Define a neuron of this module: today's with old defaults."""
    filled_in = ", ".join(f"{key}={value!r}" for key, value in defaults.items())
    text = f"Today's neuron with {filled_in or 'its own defaults'}, and the old arguments."
    return type(name, bases, {"__doc__": text, "_defaults": defaults, "__module__": __name__})


IFNode = _define("IFNode", _Old, neuron.IFNode)
LIFNode = _define("LIFNode", _Old, neuron.LIFNode)
ParametricLIFNode = _define("ParametricLIFNode", _Old, neuron.ParametricLIFNode)

# node.store_v_seq = True keeps v_seq.
_MULTI = {"step_mode": "m"}
MultiStepIFNode = _define("MultiStepIFNode", IFNode, **_MULTI)
MultiStepLIFNode = _define("MultiStepLIFNode", LIFNode, **_MULTI)
MultiStepParametricLIFNode = _define("MultiStepParametricLIFNode", ParametricLIFNode, **_MULTI)

# Of cext.neuron, where a surrogate is a name.
_CEXT = _MULTI | {"surrogate_function": "ATan", "alpha": 2.0}
CextMultiStepIFNode = _define("CextMultiStepIFNode", MultiStepIFNode, **_CEXT)
CextMultiStepLIFNode = _define("CextMultiStepLIFNode", MultiStepLIFNode, **_CEXT, tau=100.0)
CextMultiStepParametricLIFNode = _define(
    "CextMultiStepParametricLIFNode", MultiStepParametricLIFNode, **_CEXT
)


class PeriodicEncoder(encoding.PeriodicEncoder):
    """Today's, which gives the spikes of its constructor: ``spike[t % T]`` at call t."""

    def __init__(self, spike: Tensor) -> None:
        super().__init__(spike)
        self.set_reset_value("spike", spike)
        self.reset()


class MultiStepDropout(layer.Dropout):
    """Today's ``Dropout`` in step mode ``"m"``: one mask for all steps until a reset."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p, step_mode="m")


class MultiStepDropout2d(layer.Dropout2d):
    """Today's ``Dropout2d`` in step mode ``"m"``: one mask for all steps until a reset."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p, step_mode="m")


if FUNCTIONAL_STATES:

    class SurrogateFunctionBase(surrogate.SurrogateFunctionBase):
        """The base of a net's own surrogate with one parameter, ``alpha``."""

        def __init__(self, alpha: float, spiking: bool = True) -> None:
            super().__init__(spiking, alpha=alpha)

    class MultiArgsSurrogateFunctionBase(surrogate.SurrogateFunctionBase):
        """The base of a net's own surrogate that writes ``forward`` itself."""

        def __init__(self, spiking: bool, *args: Any, **kwargs: Any) -> None:
            super().__init__(spiking)
else:
    SurrogateFunctionBase = surrogate.SurrogateFunctionBase  # type: ignore[misc]
    MultiArgsSurrogateFunctionBase = surrogate.MultiArgsSurrogateFunctionBase  # type: ignore[misc]


# ---- what 0.0.0.0.14's neurons took and had, on 2.x ----


def _take_backend(kind: type) -> None:
    """Let a neuron's constructor take ``backend``, by name or where it was: at ``store_v_seq``."""
    init: Any = kind.__init__  # type: ignore[misc]
    place = [*inspect.signature(kind).parameters].index("store_v_seq")

    @wraps(init)
    def __init__(self: nn.Module, *args: Any, backend: str = "torch", **options: Any) -> None:
        if len(args) > place and isinstance(args[place], str):
            backend, args = args[place], args[:place] + args[place + 1 :]
        _check_backend(backend)
        init(self, *args, **options)

    kind.__init__ = __init__  # type: ignore[misc]


def set_backend(net: nn.Module, backend: str, instance: Any = nn.Module) -> None:
    """0.0.0.0.14's ``functional.set_backend``, which changes nothing: 2.x has no backends."""
    _check_backend(backend)


def _forward_by_hooks(
    self: Any, inputs: tuple[Tensor, ...], states: tuple[Any, ...], **kwargs: Any
) -> tuple[tuple[Tensor, ...], tuple[Any, ...]]:
    """A ``single_step_functional_forward`` by ``HOOKS``, in which 0.0.0.0.14's neurons compute."""
    before = dict(self._memories)
    self._memories.update(zip(before, states, strict=True))
    self.neuronal_charge(*inputs)
    spike = self.neuronal_fire()
    self.neuronal_reset(spike)
    after = tuple(self._memories.values())
    self._memories.update(before)
    return (spike,), after


def _forward_step_by_step(self: Any, x_seq: Tensor) -> Tensor:
    """A ``multi_step_forward`` of a neuron's own ``single_step_forward``."""
    spikes, voltages = zip(*((self.single_step_forward(x), self.v) for x in x_seq), strict=True)
    self.v_seq = torch.stack(voltages) if self.store_v_seq else None
    return torch.stack(spikes)


def _v_float_to_tensor(self: Any, x: Tensor) -> None:
    """Give the voltage the shape of the input."""
    if isinstance(self.v, float):
        self.v = torch.full_like(x.detach(), self.v)


def _check_subclass(cls: Any, **options: Any) -> None:
    """Call what a net's own neuron overrides as 0.0.0.0.14 did, or raise."""
    super(neuron.BaseNode, cls).__init_subclass__(**options)
    own, other = vars(cls).keys(), cls.single_step_functional_forward is not _forward_by_hooks
    if (hooks := HOOKS & own) and (other or issubclass(cls, neuron.AdaptBaseNode)):
        raise TypeError(
            f"{cls.__name__} overrides {', '.join(sorted(hooks))}, which SpikingJelly 2.x does not "
            f"call in {cls.__base__.__name__}: derive it from neuron.BaseNode"
        )
    steps_of_today = cls.multi_step_forward.__module__.startswith("spikingjelly.")
    if "single_step_forward" in own and steps_of_today:
        cls.multi_step_forward = _forward_step_by_step


if FUNCTIONAL_STATES:
    for _name in (
        *("AdaptBaseNode", "BaseNode", "EIFNode", "IFNode", "IzhikevichNode", "KLIFNode"),
        *("LIFNode", "ParametricLIFNode", "QIFNode"),
    ):
        _take_backend(getattr(neuron, _name))
    for _name in HOOKS:
        setattr(neuron.BaseNode, _name, getattr(neuron.SimpleBaseNode, _name))
    for _name, _value in {
        "__init_subclass__": classmethod(_check_subclass),
        "backend": "torch",
        "jit_hard_reset": staticmethod(neuron.BaseNode.apply_hard_reset),
        "jit_soft_reset": staticmethod(neuron.BaseNode.apply_soft_reset),
        "single_step_functional_forward": _forward_by_hooks,
        "v_float_to_tensor": _v_float_to_tensor,
    }.items():
        setattr(neuron.BaseNode, _name, _value)
    neuron.surrogate = surrogate
    functional.set_backend = set_backend


class SpikingLSTMCell(rnn.SpikingLSTMCell):
    """Today's without its bound of the cell's state, c <= 1."""

    def forward(self, x: Tensor, hc: Any = None) -> tuple[Tensor, Tensor]:
        h, c = x.new_zeros(2, len(x), self.hidden_size) if hc is None else hc
        i, f, g, o = (self.linear_ih(x) + self.linear_hh(h)).chunk(4, dim=1)
        fire = self.surrogate_function1
        fire_g = fire if self.surrogate_function2 is None else self.surrogate_function2
        c = fire(f) * c + fire(i) * fire_g(g)
        return fire(o) * c, c


class _OldRNN(rnn.SpikingRNNBase):
    """Today's, of one layer."""

    def forward(self, x: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        if self.num_layers > 1:
            name = type(self).__name__
            raise NotImplementedError(
                f"in 0.0.0.0.12 a {name} of several layers computed something else, or raised: "
                f"use spikingjelly.activation_based.rnn.{name}, and train again"
            )
        return super().forward(x, states)


class SpikingGRU(_OldRNN, rnn.SpikingGRU):
    """Today's, of one layer: with more, 0.0.0.0.12's raised, or dropped and started otherwise."""


class SpikingVanillaRNN(_OldRNN, rnn.SpikingVanillaRNN):
    """Today's, of one layer: in 0.0.0.0.12 the next read a single sample for the whole batch."""


class SpikingLSTM(_OldRNN, rnn.SpikingLSTM):
    """Today's with the cell of then, and layers that read the one below at the step before."""

    @staticmethod
    def base_cell() -> type[nn.Module]:
        return SpikingLSTMCell

    def forward(self, x: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        if self.bidirectional:
            return super().forward(x, states)
        shape = (2, self.num_layers, x.shape[1], self.hidden_size)
        starts = x.new_zeros(shape) if states is None else torch.stack(states)
        ends = []
        for i, cell in enumerate(self.cells):
            state, y = tuple(starts[:, i]), []
            for step in x:
                state = cell(step, state)
                y.append(state[0])
            ends.append(torch.stack(state))
            out = torch.stack(y)
            x = torch.cat([starts[:1, i], out[:-1]])
            mask = torch.ones_like(x[:1] if self.invariant_dropout_mask else x)
            x = x * dropout(mask, self.dropout_p, self.training)
        return out, tuple(torch.stack(ends, 1))


def make_net(
    make: Callable[..., nn.Module],
    *args: Any,
    single_step_neuron: Callable[..., nn.Module] | None = None,
    multi_step_neuron: Callable[..., nn.Module] | None = None,
    T: int | None = None,
    **options: Any,
) -> nn.Module:
    """Today's net ``make`` with old arguments: ``T`` repeats an input without time, [N, *]."""
    net = make(*args, spiking_neuron=single_step_neuron or multi_step_neuron, **options)
    if multi_step_neuron is not None:
        functional.set_step_mode(net, "m")
    if T is not None:
        net.register_forward_pre_hook(partial(_repeat, T))
    return net


def _repeat(T: int, net: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    return (x.expand(T, *x.shape) if x.dim() == 4 else x,)


def _nets(today: ModuleType) -> dict[str, Any]:
    """The names of an old module of nets."""
    makers = {n: make for n, make in vars(today).items() if n.startswith(("sew_", "spiking_"))}
    old = {name: partial(make_net, make) for name, make in makers.items()}
    return old | {f"multi_step_{name}": make for name, make in old.items()}


def _layer(name: str, lacking: type) -> type:
    """A layer of today's, in 0.0.0.0.14 with the base that it lacks there to run."""
    today: type = getattr(layer, name)
    if FUNCTIONAL_STATES:
        return today
    place = {"__module__": "spikingjelly.clock_driven.layer"}  # where pickle finds it
    return type(f"MultiStep{name}", (today, lacking), place)


def _named(*kinds: type) -> dict[str, Any]:
    return {kind.__name__: kind for kind in kinds}


#: the old modules, and their names that differ from today's module of that name
NAMES: dict[str, dict[str, Any]] = {
    "clock_driven": {},
    **{f"clock_driven.{name}": {} for name in ("accelerating", "ann2snn", "base", "functional")},
    **{f"clock_driven.{name}": {} for name in ("lava_exchange", "monitor", "spike_op")},
    "clock_driven.encoding": _named(PeriodicEncoder),
    "clock_driven.layer": {
        **_named(MultiStepDropout, MultiStepDropout2d),
        "MultiStepTemporalWiseAttention": _layer("TemporalWiseAttention", nn.Module),
        **{
            f"MultiStepThresholdDependent{kind.__name__}": _layer(
                f"ThresholdDependent{kind.__name__}", kind
            )
            for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        },
    },
    "clock_driven.model": {},
    "clock_driven.model.parametric_lif_net": {},
    "clock_driven.model.sew_resnet": _nets(sew_resnet),
    "clock_driven.model.spiking_resnet": _nets(spiking_resnet),
    "clock_driven.model.spiking_vgg": _nets(spiking_vgg),
    "clock_driven.neuron": {
        **_named(IFNode, LIFNode, ParametricLIFNode),
        **_named(MultiStepIFNode, MultiStepLIFNode, MultiStepParametricLIFNode),
        "surrogate": surrogate,
    },
    "clock_driven.rnn": _named(SpikingGRU, SpikingLSTM, SpikingLSTMCell, SpikingVanillaRNN),
    "clock_driven.surrogate": _named(SurrogateFunctionBase, MultiArgsSurrogateFunctionBase),
    "cext": {},
    "cext.layer": {},
    "cext.neuron": {
        kind.__name__.removeprefix("Cext"): kind
        for kind in (CextMultiStepIFNode, CextMultiStepLIFNode, CextMultiStepParametricLIFNode)
    },
}
#: what to use for an old module, or for one of its names
GONE = {
    "clock_driven.accelerating": "sj_taid.accelerate",
    "clock_driven.ann2snn": "spikingjelly.activation_based.ann2snn",
    "clock_driven.lava_exchange": "spikingjelly.activation_based.lava_exchange",
    "clock_driven.model.parametric_lif_net": "spikingjelly.activation_based.model."
    "parametric_lif_net, whose checkpoints have other keys",
    "clock_driven.monitor": "sj_taid.monitor",
    "clock_driven.spike_op": "torch.nn.functional",
    "cext.layer": "torch.nn",
    "cext.neuron": "clock_driven.neuron",
    "clock_driven.functional.fuse_convbn2d": "torch.nn.utils.fusion.fuse_conv_bn_eval",
    "clock_driven.layer.ConvBatchNorm2d": "nn.Sequential(nn.Conv2d(...), nn.BatchNorm2d(...))",
    **{
        f"clock_driven.layer.{name}": "a copy of 0.0.0.0.12's: no later version has it"
        for name in ("AXAT", "ChannelsPool", "DCT")
    },
    "clock_driven.layer.STDPLearner": "spikingjelly.activation_based.learning.STDPLearner",
    "clock_driven.neuron.AdaptiveBaseNode": "neuron.AdaptBaseNode",
    "clock_driven.neuron.GeneralNode": "a subclass of neuron.BaseNode",
    "clock_driven.surrogate.LeakyKReLU": "spikingjelly.activation_based.surrogate.LeakyKReLU, "
    "which takes (leak, k, spiking): it took (spiking, leak, k)",
    "clock_driven.surrogate.PiecewiseLeakyReLU": "spikingjelly.activation_based.surrogate."
    "PiecewiseLeakyReLU if an inner slope of 1/(2w) will do: it was 1/w",
    "clock_driven.surrogate.piecewise_leaky_relu": "spikingjelly.activation_based.surrogate."
    "piecewise_leaky_relu if an inner slope of 1/(2w) will do: it was 1/w",
    "clock_driven.surrogate.check_cuda_grad": "torch.autograd.gradcheck",
}
#: names of today's surrogates that are something else than of old; GONE says why
_OTHERS = {"LeakyKReLU", "PiecewiseLeakyReLU", "piecewise_leaky_relu"}


class _OldModule(ModuleType):
    """A module of old names; one that is gone raises an error that says what to use."""

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(f"spikingjelly.{name}")
        vars(self).update(names, __path__=[])
        sys.modules[self.__name__] = self
        parent, _, child = self.__name__.rpartition(".")
        setattr(sys.modules[parent], child, self)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(self.explain(name) or f"{self.__name__} has no attribute {name!r}")

    def explain(self, name: str) -> str | None:
        """What to use in place of a name of then, or ``None`` for any other."""
        if name[:1] in ("", "_"):
            return None
        module = self.__name__.removeprefix("spikingjelly.")
        instead = GONE.get(f"{module}.{name.removeprefix('MultiStep')}") or GONE.get(module)
        if instead is None and name.startswith("MultiStep"):
            instead = f'{name.removeprefix("MultiStep")}(..., step_mode="m")'
        return instead and f"{self.__name__}.{name} is not in this SpikingJelly: use {instead}"


class _Explainer(MetaPathFinder):
    """Says the same of ``from module import name``.

    There Python drops an ``AttributeError`` and looks for a module of that name: the modules of old
    names are packages to it. An ``ImportError`` would be shown, but also stop ``hasattr``, and
    ``pickle``, which asks all modules for the name of a function that has no module.
    """

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> None:
        parent, _, name = fullname.rpartition(".")
        module = sys.modules.get(parent)
        if isinstance(module, _OldModule) and (explanation := module.explain(name)):
            raise ImportError(explanation)


def _same_names(name: str) -> dict[str, Any]:
    """The names of today's module."""
    package, _, module = name.partition(".")
    if package == "cext" or not module or name in GONE:
        return {}
    today = import_module(f"spikingjelly.activation_based.{module}")
    names = {name: value for name, value in vars(today).items() if not name.startswith("_")}
    if FUNCTIONAL_STATES:
        names = {key: value for key, value in names.items() if key not in _OTHERS}
    return names


sys.meta_path.append(_Explainer())
for _name, _names in NAMES.items():
    _OldModule(_name, _same_names(_name) | _names)
