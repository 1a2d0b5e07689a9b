"""Small nets of SpikingJelly's zoo: one of each architecture that takes any of its neurons."""

from importlib import import_module
from importlib.util import find_spec

import torch
from spikingjelly.activation_based import functional, surrogate
from spikingjelly.activation_based.model import sew_resnet

_MODELS = "spikingjelly.activation_based.model."
_FORMER = {"embed_dims": 32, "num_heads": 2, "depths": 1}
_SIZES = {"img_size_h": 16, "img_size_w": 16, "patch_size": 4}
_BLOCKS = {"block": sew_resnet.BasicBlock, "layers": [1, 1, 1, 1], "num_classes": 10}

#: name -> the class, and what it takes besides neurons
_NETS = {
    "sew_resnet": ("sew_resnet.SEWResNet", _BLOCKS | {"cnf": "ADD"}),
    "mnist_net": ("parametric_lif_net.MNISTNet", {"channels": 8}),
    "spikformer": ("spikformer.Spikformer", _FORMER | _SIZES),
    "qkformer": ("qkformer.QKFormer", _FORMER | {"num_heads": (1, 2, 2), "depths": (1, 1, 1)}),
    "spike_driven": ("spike_driven_transformer.SpikeDrivenTransformer", _FORMER),
    "max_resnet": ("ms_resnet.MaxResNet", {"base_channels": 8, "layers": (1, 1, 1)}),
    "masnn": (
        "masnn.MASNN",
        {"T": 5, "in_channels": 3, "input_size": (16, 16), "channels": (8, 8, 8)},
    ),
}
_SHAPES = {
    "mnist_net": (2, 2, 1, 28, 28),
    "masnn": (5, 2, 3, 16, 16),
}

#: the nets that this SpikingJelly has
ZOO = [name for name, (kind, _) in _NETS.items() if find_spec(_MODELS + kind.split(".")[0])]


def build(name, kind):
    """The net of these neurons, multi-step, and an input of it."""
    path, options = _NETS[name]
    module, class_name = path.split(".")
    # A low threshold, so that spikes reach the last layer of an untrained net.
    options = options | {"spiking_neuron": kind, "surrogate_function": surrogate.ATan()}
    options |= {"detach_reset": True, "v_threshold": 0.3}
    net = getattr(import_module(_MODELS + module), class_name)(**options)
    functional.set_step_mode(net, "m")
    return net, torch.randn(_SHAPES.get(name, (2, 2, 3, 16, 16)))
