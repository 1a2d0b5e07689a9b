"""Measurements beside SpikingJelly's neurons: ``python -m sj_taid.benchmark.neuron`` and so on.

:mod:`.neuron` time, :mod:`.memory` bytes kept for backward, :mod:`.norm` both of norms and neurons
in nets, :mod:`.fsvae` a model. Each writes a CSV whose rows carry command, commit and machine.
"""

from .._extras import needs

with needs("hydra-core filelock lightning matplotlib pandas torchvision"):
    from . import common as common
