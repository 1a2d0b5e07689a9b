"""What is taken of torch's private names: modes, memory addresses, saved-tensor hooks, batch norm.

No function reads what a graph saved, which would run the hooks of checkpointing and offloading.
"""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import _engine_run_backward, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _python_dispatch

#: the base of ``Tensor`` with the attributes that C++ defines
TensorBase: Any = torch._C.TensorBase
#: the context in which a subclass of ``Tensor`` is a plain tensor
plain_functions: Any = torch._C.DisableTorchFunctionSubclass
#: lets a function run outside of the graphs of torch.compile, which break there
outside_graphs: Any = torch._disable_dynamo
is_autocast_enabled: Callable[[], bool] = torch._C._is_any_autocast_enabled
#: whether ``torch.func`` transforms what runs
is_transformed: Callable[[], bool] = torch._C._are_functorch_transforms_active
#: whether a tensor hides a batch, as the gradients of ``is_grads_batched=True`` do
is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor
#: ``F.batch_norm`` that gives mean and ``(var + eps)^(-1/2)`` of the batch too
batch_norm: Any = torch._batch_norm_impl_index
batch_norm_backward: Any = torch.ops.aten.native_batch_norm_backward.default


def map_batch(rule: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a ``vmap`` of ``torch.autograd.Function`` gives of arguments that hide a batch."""
    hidden = [isinstance(a, Tensor) and is_batched(a) for a in arguments]
    first = arguments[hidden.index(True)]
    # No function tells its level, which is another one only in a batch of batches.
    level = next(n for n in range(1, 64) if not is_batched(torch._remove_batch_dim(first, n, 1, 0)))
    shown = [
        torch._remove_batch_dim(a, level, 1, 0) if is_hidden else a
        for a, is_hidden in zip(arguments, hidden, strict=True)
    ]
    info = SimpleNamespace(batch_size=len(shown[hidden.index(True)]))
    results, axes = rule(info, [0 if is_hidden else None for is_hidden in hidden], *shown)
    return tuple(
        r if axis is None else torch._add_batch_dim(r, axis, level)
        for r, axis in zip(results, axes, strict=True)
    )


def gradients(roots: Any, leaves: Any, upstream: Any) -> tuple[Any, ...]:
    """``torch.autograd.grad``, to be asked again; it leaves a mode of functions on in backward."""
    return _engine_run_backward(roots, upstream, True, False, tuple(leaves), True, False)


def recomputation() -> int | None:
    """The number of the node whose backward calls this forward (checkpointing), or ``None``."""
    node = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def is_eager() -> bool:
    """Whether torch computes now, and nothing compiles, traces, watches or transforms it."""
    if torch.compiler.is_compiling():
        return False
    return not (
        torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or is_transformed()
        or forward_ad._current_level >= 0
    )


def constant_in_graphs(function: Any) -> Any:
    """Let torch.compile run ``function`` as it is, and use what it returns as a constant.

    As ``torch.compiler.assume_constant_result``, without importing Dynamo, which takes a second.
    """
    function._dynamo_marked_constant = True
    return function


def as_constant(value: Any) -> Any:
    """A number whose value torch.compile compiles into a graph, which keeps floats as symbols.

    It asks for the value of what ``groupby`` groups by.
    """
    return next(groupby([value]))[0] if isinstance(value, float) else value


def steps_aside() -> bool:
    """Whether something traces, counts or transforms operations, and needs plain modules."""
    if torch.jit.is_tracing() or torch.compiler.is_exporting():
        return True
    return is_watched() or is_transformed()


def is_watched() -> bool:
    """Whether a dispatch mode, such as SpikingJelly's counters, sees each operation of torch.

    To it a fused call would be one operator that it knows nothing of. The modes of torch.compile
    and of selective checkpointing take such operators as they are.
    """
    return _python_dispatch.is_in_torch_dispatch_mode(include_infra_modes=False) and any(
        not mode.is_infra_mode() and type(mode).__module__ != "torch.utils.checkpoint"
        for mode in _python_dispatch._get_current_dispatch_mode_stack()
    )


def address_of(tensor: Tensor) -> int:
    """Where the tensor's memory is; 0 if it has none, as a wrapper."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):
        return 0


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """A key of the tensor's storage, which no later one has; ``None`` of a sparse tensor."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


def is_one_storage(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors, which may lie on the meta device, are views of one storage."""
    return tensor.untyped_storage()._cdata == other.untyped_storage()._cdata


def shares_memory(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors are in one memory."""
    return 0 != address_of(tensor) == address_of(other)


def version_of(tensor: Tensor) -> int:
    """How often the tensor has changed in place; 0 of an inference tensor, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def is_capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph of work on ``tensor`` is captured: its replays change no version."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


#: whether ``saved_tensors_hooks`` may be opened; ``torch.func`` forbids them
allows_hooks = torch._C._autograd._saved_tensors_hooks_is_enabled  # type: ignore[attr-defined]


#: the innermost open ``saved_tensors_hooks``: their pack and unpack functions, or ``None``
saving_hooks = partial(torch._C._autograd._top_saved_tensors_default_hooks, True)
push_hooks = torch._C._autograd._push_saved_tensors_default_hooks
pop_hooks = torch._C._autograd._pop_saved_tensors_default_hooks


def are_others(hooks: Any) -> bool:
    """Whether these ``saved_tensors_hooks`` are any but those of :func:`record_saved`."""
    return hooks is not None and getattr(hooks[0], "__module__", None) != __name__


def record_saved(forward: Callable[[], Any], there: Iterable[Tensor]) -> tuple[Any, int]:
    """What ``forward`` gives, and the bytes of the memory that it keeps for backward.

    A part keeps all of its memory. What was ``there`` before does not count.

    >>> x = torch.ones(4, 2, requires_grad=True) * 1.0
    >>> record_saved(lambda: (x.sin(), x.t().sin(), x[:1].sin()), [])[1]
    32
    >>> record_saved(x.sin, [x[1:]])[1]
    0
    """
    known = {address_of(tensor) for tensor in there} | {0}
    saved = {}  # tensors, so that no address comes twice

    def note(tensor: Tensor) -> Tensor:
        if (address := address_of(tensor)) not in known:
            saved[address] = tensor
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    return output, sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def are_checkpoints(hooks: Any) -> bool:
    """Whether these ``saved_tensors_hooks`` are gradient checkpointing's."""
    return getattr(hooks and hooks[0], "__module__", None) == "torch.utils.checkpoint"


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` where no transform of ``torch.func`` runs, without its Python."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def is_dynamo_near() -> bool:
    """Whether a graph of torch.compile is traced, or runs around this call."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() is not None
