"""Small nets of SpikingJelly's zoo: each architecture that takes any of its neurons."""

from importlib import import_module
from importlib.util import find_spec

import torch
from spikingjelly.activation_based import functional, surrogate
from spikingjelly.activation_based.model import sew_resnet, spiking_resnet

_MODELS = "spikingjelly.activation_based.model."
_BLOCKS = {"layers": [1, 1, 1, 1], "num_classes": 10}
_STAGES = {"base_channels": 8, "layers": (1, 1, 1, 1)}
_DEPTHS = {"embed_dims": 32, "depths": (1, 1, 1)}
_FORMER = {"embed_dims": 32, "num_heads": 2, "depths": 1}
_SIZES = {"img_size_h": 16, "img_size_w": 16, "patch_size": 4}
_MASNN = {"T": 5, "in_channels": 3, "input_size": (16, 16), "channels": (8, 8, 8)}


def _net(path, options, shape=(2, 2, 3, 16, 16), **more):
    """The class, what it takes besides neurons, and an input's shape."""
    return path, options | more, shape


_PLAIN, _SEW = "spiking_resnet.SpikingResNet", "sew_resnet.SEWResNet"
_SMALL = (2, 2, 3, 8, 8)
_NETS = {
    "spiking_resnet": _net(_PLAIN, _BLOCKS, block=spiking_resnet.BasicBlock),
    "spiking_bottleneck": _net(_PLAIN, _BLOCKS, _SMALL, block=spiking_resnet.Bottleneck),
    "sew_resnet": _net(_SEW, _BLOCKS, block=sew_resnet.BasicBlock, cnf="ADD"),
    "sew_bottleneck": _net(_SEW, _BLOCKS, _SMALL, block=sew_resnet.Bottleneck, cnf="IAND"),
    "mnist_net": _net("parametric_lif_net.MNISTNet", {"channels": 8}, (2, 2, 1, 28, 28)),
    "cifar10_net": _net("parametric_lif_net.CIFAR10Net", {"channels": 4}, (2, 1, 3, 32, 32)),
    "spikformer": _net("spikformer.Spikformer", _FORMER | _SIZES),
    "maxformer": _net("maxformer.MaxFormer", _DEPTHS),
    "maxformer_cifar": _net("maxformer.MaxFormer", _DEPTHS, cifar=True),
    "qkformer": _net("qkformer.QKFormer", _DEPTHS, num_heads=(1, 2, 2)),
    "spike_driven": _net("spike_driven_transformer.SpikeDrivenTransformer", _FORMER),
    "ms_resnet": _net("ms_resnet.MSResNet", _STAGES),
    "max_resnet": _net("ms_resnet.MaxResNet", _STAGES | {"layers": (1, 1, 1)}),
    "masnn": _net("masnn.MASNN", _MASNN, (5, 2, 3, 16, 16)),
    "att_ms_resnet": _net("masnn.AttMSResNet", _STAGES),
}
#: the nets that this SpikingJelly has
ZOO = [name for name, (path, *_) in _NETS.items() if find_spec(_MODELS + path.split(".")[0])]


def build(name, kind):
    """The net of these neurons, multi-step, and an input of it."""
    path, options, shape = _NETS[name]
    module, class_name = path.split(".")
    # A low threshold, so that spikes reach the last layer of an untrained net.
    options = options | {"spiking_neuron": kind, "surrogate_function": surrogate.ATan()}
    options |= {"detach_reset": True, "v_threshold": 0.3}
    net = getattr(import_module(_MODELS + module), class_name)(**options)
    functional.set_step_mode(net, "m")
    return net, torch.randn(shape)
