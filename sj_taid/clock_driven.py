"""Run old nets: one import gives the modules, arguments and bases that they were written for.

What the import does, for the whole process:

* It adds the old modules to ``sys.modules`` and ``spikingjelly``.
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
and a ``state_dict`` keeps its keys. Names that are gone: docs/old-nets.md.

Source: SpikingJelly 0.0.0.0.12, with ``backend`` given by name; for ``cext.neuron`` 0.0.0.0.4, with
all arguments given by name.
"""

import inspect
import sys
import warnings
from collections.abc import Callable
from functools import cache, partial, wraps
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import encoding, functional, layer, neuron, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet, spiking_vgg
from torch import Tensor, nn

from ._compat import FUNCTIONAL_STATES, HOOKS, states_of

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


@cache
def _check_backend(backend: str) -> None:
    """Check a backend of then, which is not used, and say so once of CuPy."""
    if backend not in ("torch", "cupy"):
        raise ValueError(f"backend must be 'torch' or 'cupy', but it is {backend!r}")
    if backend == "cupy":
        message = (
            "backend='cupy' is taken and not used: the neurons are today's, which SpikingJelly "
            "runs as it sees fit. sj_taid.accelerate(net) runs them on a fused operator"
        )
        warnings.warn(message, stacklevel=3)


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
    now = states_of(self)
    before = dict(now)
    now.update(zip(before, states, strict=True))
    self.neuronal_charge(*inputs)
    spike = self.neuronal_fire()
    self.neuronal_reset(spike)
    after = tuple(now.values())
    now.update(before)
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


#: the names of each old module that today's of that name lacks, or that were something else
OLD_NAMES: dict[str, dict[str, Any]] = {
    "base": {},
    "encoding": _named(PeriodicEncoder),
    "functional": {},
    "layer": {
        **_named(MultiStepDropout, MultiStepDropout2d),
        "MultiStepTemporalWiseAttention": _layer("TemporalWiseAttention", nn.Module),
        **{
            f"MultiStepThresholdDependent{kind.__name__}": _layer(
                f"ThresholdDependent{kind.__name__}", kind
            )
            for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        },
    },
    "model.sew_resnet": _nets(sew_resnet),
    "model.spiking_resnet": _nets(spiking_resnet),
    "model.spiking_vgg": _nets(spiking_vgg),
    "neuron": {
        **_named(IFNode, LIFNode, ParametricLIFNode),
        **_named(MultiStepIFNode, MultiStepLIFNode, MultiStepParametricLIFNode),
        "surrogate": surrogate,
    },
    "surrogate": _named(SurrogateFunctionBase, MultiArgsSurrogateFunctionBase),
}
#: today's surrogates that 2.x computes, or whose arguments it orders, otherwise than of old
CHANGED = {"LeakyKReLU", "PiecewiseLeakyReLU", "piecewise_leaky_relu"} if FUNCTIONAL_STATES else ()


def _add_module(name: str, names: dict[str, Any]) -> None:
    """Add ``spikingjelly.NAME``."""
    module = ModuleType(f"spikingjelly.{name}")
    vars(module).update(names)
    sys.modules[module.__name__] = module
    parent, _, child = module.__name__.rpartition(".")
    setattr(sys.modules[parent], child, module)


for _name in ("clock_driven", "clock_driven.model", "cext"):
    _add_module(_name, {})
for _name, _names in OLD_NAMES.items():
    _today = vars(import_module(f"spikingjelly.activation_based.{_name}"))
    _same = {k: v for k, v in _today.items() if k[0] != "_" and k not in CHANGED}
    _add_module(f"clock_driven.{_name}", _same | _names)
_cext = (CextMultiStepIFNode, CextMultiStepLIFNode, CextMultiStepParametricLIFNode)
_add_module("cext.neuron", {kind.__name__.removeprefix("Cext"): kind for kind in _cext})
