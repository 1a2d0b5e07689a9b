"""Run old nets: one import gives the modules, arguments and bases that they were written for.

Up to 0.0.0.0.12 SpikingJelly had ``spikingjelly.clock_driven`` and ``spikingjelly.cext.neuron``,
which most published nets import. Import this first:

>>> import sj_taid.clock_driven
>>> from spikingjelly.clock_driven import layer, neuron, surrogate
>>> neuron.MultiStepLIFNode(detach_reset=True, surrogate_function=surrogate.ATan()).step_mode
'm'

It adds these modules to ``sys.modules`` and ``spikingjelly``. Their names stand for today's
classes, or for subclasses that fill in the defaults of then, so :func:`sj_taid.accelerate` and
:func:`sj_taid.swap_neurons` take them, and a ``state_dict`` keeps its keys.

On 2.x it changes ``activation_based`` itself, for the whole process, so that nets of 0.0.0.0.14
run: constructors of neurons take ``backend`` and do not use it, a ``BaseNode`` that defines
``neuronal_charge`` and a ``MemoryModule`` that defines ``single_step_forward`` are called as then,
and ``neuron.surrogate`` and ``functional.set_backend`` exist. docs/old-nets.md lists what is gone.

Source: SpikingJelly 0.0.0.0.12, with ``backend`` given by name; for ``cext.neuron`` 0.0.0.0.4, with
all arguments given by name.
"""

import inspect
import sys
import warnings
from functools import cache, partial, wraps
from importlib import import_module
from types import ModuleType
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import Tensor, nn

from ._internal.compat import FUNCTIONAL_STATES, HOOKS, states_of

if "spikingjelly.clock_driven" in sys.modules:
    raise ImportError("import sj_taid.clock_driven before spikingjelly.clock_driven")


class _Old(nn.Module):
    """A base before one of today's classes: it takes the old arguments that this one does not."""

    _defaults: ClassVar[dict[str, Any]] = {}

    def __init__(self, *args: Any, backend: str = "torch", **options: Any) -> None:
        _check_backend(backend)
        unused = ("cupy_fp32_inference", "lava_s_cale")
        options = {k: v for k, v in (self._defaults | options).items() if k not in unused}
        if isinstance(name := options.get("surrogate_function"), str):  # as in cext.neuron
            alpha = {"alpha": options.pop("alpha")} if "alpha" in options else {}
            options["surrogate_function"] = getattr(surrogate, name)(**alpha)
        super().__init__(*args, **options)
        if not isinstance(decays := getattr(self, "decay_input", True), bool):
            raise TypeError(
                f"decay_input must be True or False, but it is {decays!r}: older versions "
                "had another order of arguments, so give them by name"
            )


@cache
def _check_backend(backend: str) -> None:
    """Check an old ``backend``, which has no effect, and say so once of CuPy."""
    if backend not in ("torch", "cupy"):
        raise ValueError(f"backend must be 'torch' or 'cupy', but it is {backend!r}")
    if backend == "cupy":
        warnings.warn(
            "backend='cupy' is taken and not used: the neurons are today's, which SpikingJelly "
            "runs as it sees fit. sj_taid.accelerate(net) runs them on a fused operator",
            stacklevel=3,
        )


def _define(name: str, *kinds: Any, **defaults: Any) -> Any:
    """Define a subclass of ``kinds`` with old defaults, in this module, where pickle finds it."""
    names = {"_defaults": getattr(kinds[0], "_defaults", {}) | defaults, "__module__": __name__}
    made = globals()[name] = type(name, kinds, names)
    return made


_NEURONS, _CEXT, _LAYERS = {}, {}, {}
for _kind in (neuron.IFNode, neuron.LIFNode, neuron.ParametricLIFNode):
    _name, _many = _kind.__name__, f"MultiStep{_kind.__name__}"
    _NEURONS[_name] = _define(_name, _Old, _kind)
    _NEURONS[_many] = _define(_many, _NEURONS[_name], step_mode="m")
    _tau = {"tau": 100.0} if _kind is neuron.LIFNode else {}
    _options = {"surrogate_function": "ATan", "alpha": 2.0, **_tau}
    _CEXT[_many] = _define(f"Cext{_many}", _NEURONS[_many], **_options)
for _kind in (layer.Dropout, layer.Dropout2d):  # one mask for all steps until a reset
    _many = f"MultiStep{_kind.__name__}"
    _LAYERS[_many] = _define(_many, _kind)

    def _init(self: Any, p: float = 0.5, init: Any = _kind.__init__) -> None:
        init(self, p, step_mode="m")

    _LAYERS[_many].__init__ = _init
for _base in (nn.Module, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
    _is_norm = _base is not nn.Module
    _name = f"ThresholdDependent{_base.__name__}" if _is_norm else "TemporalWiseAttention"
    _many, _kind = f"MultiStep{_name}", getattr(layer, _name)
    # In 0.0.0.0.14 they lack the base that they need to run.
    _LAYERS[_many] = _kind if FUNCTIONAL_STATES else _define(_many, _kind, _base)


# ---- what 0.0.0.0.14's neurons took and had, on 2.x ----


def _take_backend(kind: Any) -> None:
    """Let a neuron's constructor take ``backend``, by name or where it was: at ``store_v_seq``."""
    init, place = kind.__init__, [*inspect.signature(kind).parameters].index("store_v_seq")

    @wraps(init)
    def __init__(self: nn.Module, *args: Any, backend: str = "torch", **options: Any) -> None:
        if len(args) > place and isinstance(args[place], str):
            backend, args = args[place], args[:place] + args[place + 1 :]
        _check_backend(backend)
        init(self, *args, **options)

    kind.__init__ = __init__


def _forward_by_hooks(self: Any, inputs: Any, states: Any, **kwargs: Any) -> Any:
    """One step with explicit states by charge, fire and reset, as 0.0.0.0.14's neurons compute."""
    now = states_of(self)
    before = dict(now)
    now.update(zip(before, states, strict=True))
    self.neuronal_charge(*inputs)
    spike = self.neuronal_fire()
    self.neuronal_reset(spike)
    after = tuple(now.values())
    now.update(before)
    return (spike,), after


def _forward_step_by_step(self: Any, x_seq: Tensor, *args: Any, **options: Any) -> Tensor:
    """A sequence, by a module's own ``single_step_forward``."""
    step = partial(self.single_step_forward, **options)
    outputs, voltages = zip(*((step(x, *args), getattr(self, "v", 0)) for x in x_seq), strict=True)
    if getattr(self, "store_v_seq", False):
        self.v_seq = torch.stack(voltages)
    return torch.stack(outputs)


def _v_float_to_tensor(self: Any, x: Tensor) -> None:
    """Give the voltage the shape of the input."""
    if isinstance(self.v, float):
        self.v = torch.full_like(x.detach(), self.v)


def _init_subclass(cls: Any, **options: Any) -> None:
    """Call what a net's own module overrides as 0.0.0.0.14 did, or raise."""
    super(base.MemoryModule, cls).__init_subclass__(**options)
    kind = next(kind for kind in cls.__mro__ if kind.__module__.startswith("spikingjelly."))
    if kind is cls:
        return
    hooks = sorted(name for name in HOOKS if getattr(cls, name, 0) is not getattr(kind, name, 0))
    calls = cls.single_step_functional_forward is _forward_by_hooks
    calls = calls and not issubclass(cls, neuron.AdaptBaseNode)
    if hooks and issubclass(cls, neuron.BaseNode) and not calls:
        raise TypeError(
            f"{cls.__name__} overrides {', '.join(hooks)}, which SpikingJelly 2.x does not call in "
            f"{kind.__name__}: derive it from neuron.BaseNode"
        )
    steps = (cls.single_step_forward, cls.multi_step_forward)
    if [step.__module__.startswith("spikingjelly.") for step in steps] == [False, True]:
        cls.multi_step_forward = _forward_step_by_step


class _OneParameter(surrogate.SurrogateFunctionBase):
    """The base of a net's own surrogate with one parameter, ``alpha``."""

    def __init__(self, alpha: float, spiking: bool = True) -> None:
        super().__init__(spiking, alpha=alpha)


_SURROGATES: dict[str, Any] = {}
#: today's names that mean something else than of old
_CHANGED = {"PeriodicEncoder"}
if FUNCTIONAL_STATES:
    _CHANGED |= {"LeakyKReLU", "PiecewiseLeakyReLU", "piecewise_leaky_relu"}
    _SURROGATES["SurrogateFunctionBase"] = _OneParameter
    _SURROGATES["MultiArgsSurrogateFunctionBase"] = surrogate.SurrogateFunctionBase
    _kinds = [k for k in vars(neuron).values() if isinstance(k, type)]
    for _kind in [k for k in _kinds if issubclass(k, neuron.BaseNode)]:
        if "store_v_seq" in inspect.signature(_kind).parameters:
            _take_backend(_kind)
    for _name in HOOKS:
        setattr(neuron.BaseNode, _name, getattr(neuron.SimpleBaseNode, _name))
    neuron.BaseNode.backend = "torch"
    neuron.BaseNode.jit_hard_reset = staticmethod(neuron.BaseNode.apply_hard_reset)
    neuron.BaseNode.jit_soft_reset = staticmethod(neuron.BaseNode.apply_soft_reset)
    neuron.BaseNode.single_step_functional_forward = _forward_by_hooks
    neuron.BaseNode.v_float_to_tensor = _v_float_to_tensor
    neuron.surrogate = surrogate
    base.MemoryModule.__init_subclass__ = classmethod(_init_subclass)
    functional.set_backend = lambda net, backend, instance=None: _check_backend(backend)


# ---- nets, and the modules ----


def _make_net(make: Any, *args: Any, T: int | None = None, **options: Any) -> nn.Module:
    """Make one of today's nets by old arguments; ``T`` repeats an input without time, [N, *]."""
    many = options.pop("multi_step_neuron", None)
    options["spiking_neuron"] = options.pop("single_step_neuron", many)
    net = make(*args, **options)
    if many is not None:
        functional.set_step_mode(net, "m")
    if T is not None:
        net.register_forward_pre_hook(partial(_repeat, T))
    return net


def _repeat(T: int, net: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    (x,) = inputs
    return (x.expand(T, *x.shape) if x.dim() == 4 else x,)


def _add_module(name: str, names: dict[str, Any]) -> None:
    """Add ``spikingjelly.NAME``."""
    module = sys.modules[f"spikingjelly.{name}"] = ModuleType(f"spikingjelly.{name}")
    vars(module).update(names)
    parent, _, child = module.__name__.rpartition(".")
    setattr(sys.modules[parent], child, module)


for _name in ("clock_driven", "clock_driven.model", "cext"):
    _add_module(_name, {})
_add_module("cext.neuron", _CEXT)
for _name, _names in {
    **{"base": {}, "encoding": {}, "functional": {}, "layer": _LAYERS, "surrogate": _SURROGATES},
    "neuron": _NEURONS | {"surrogate": surrogate},
    **{f"model.{kind}": {} for kind in ("sew_resnet", "spiking_resnet", "spiking_vgg")},
}.items():
    _today = vars(import_module(f"spikingjelly.activation_based.{_name}"))
    _same = {k: v for k, v in _today.items() if k[0] != "_" and k not in _CHANGED}
    for _make in [n for n in _same if _name[:6] == "model." and n.startswith(("sew_", "spiking_"))]:
        _same[_make] = _same[f"multi_step_{_make}"] = partial(_make_net, _same[_make])
    _add_module(f"clock_driven.{_name}", _same | _names)
