"""Modes that watch what torch computes, such as SpikingJelly's operation counters."""

from torch.utils import _python_dispatch


def is_watched() -> bool:
    """Whether a dispatch mode would see a fused call as one operator that it knows nothing of.

    The modes of torch.compile and of selective checkpointing take such operators as they are.
    """
    return _python_dispatch.is_in_torch_dispatch_mode(include_infra_modes=False) and any(
        not mode.is_infra_mode() and type(mode).__module__ != "torch.utils.checkpoint"
        for mode in _python_dispatch._get_current_dispatch_mode_stack()
    )


#: the context in which modes do not count operations, those that SpikingJelly's neurons do not have
hide_from_modes = _python_dispatch._disable_current_modes
