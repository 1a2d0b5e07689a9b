"""Spiking classifier of images and of event frames."""

from collections.abc import Sequence
from functools import partial
from itertools import chain

from spikingjelly.activation_based import layer, surrogate
from torch import Tensor, nn

from .._internal.checks import check, check_flags, check_sizes, integer
from ..neuron import ALIFNode
from .block import Neuron, check_images, make_neuron, reset

#: ALIF that starts as in the paper's classifiers.
paper_neuron = partial(
    ALIFNode,
    init_tau=2.0,
    decay_input=True,
    v_threshold=0.5,
    v_reset=0.0,
    surrogate_function=surrogate.ATan(),
    detach_reset=True,
    step_mode="m",
)


class Classifier(nn.Module):
    """Spiking classifier (PLIF-net) of still images and of frames of events.

    Each stage is {convolution 3x3, batch norm, neuron} for each of its widths, then max pooling
    by 2; without the norm a convolution has a bias instead. The head is {dropout, linear, neuron}
    twice; the mean over time and over the neurons of a class is that class's rate. A dropout mask
    is shared by all time steps.

    A still image is the input current of every step. Every pass starts from rest and leaves the
    neurons at rest; :func:`sj_taid.monitor` sees their activity.

    Args:
        in_channels: channels C of the input.
        image_size: its height and width H = W.
        classes: number of classes.
        T: number of time steps for a still image; frames bring their own.
        stages: the widths of the convolutions, stage by stage: ``[[128], [128]]`` pools after
            each convolution, ``[[256] * 3, [256] * 3]`` after the third and the sixth.
        hidden: width of the hidden linear layer.
        neurons_per_class: output neurons per class.
        dropout: probabilities before the hidden and before the last layer.
        neuron: makes a neuron; any SpikingJelly neuron in step mode ``"m"``.
        norm: use a batch norm after each convolution.
        per_channel: give each neuron layer parameters per channel: ``neuron`` is called with
            ``channels=``, which ALIF takes.
        output_neuron: False leaves the last neurons out: the outputs are their input currents,
            unbounded, as losses of logits need them.

    Raises:
        ValueError: sizes that do not fit, or input of another shape or not finite.

    Source: Fang et al., ICCV 2021, arXiv 2007.05785 (the net); Qiu et al. 2023, arXiv 2406.03046
    (with ALIF).

    >>> import torch
    >>> model = Classifier(image_size=8, T=4, stages=[[4], [6]], hidden=16)
    >>> model(torch.rand(2, 1, 8, 8)).shape, model(torch.rand(5, 2, 1, 8, 8)).shape
    (torch.Size([2, 10]), torch.Size([2, 10]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 28,
        classes: int = 10,
        T: int = 8,
        stages: Sequence[Sequence[int]] = ((128,), (128,)),
        hidden: int = 2048,
        neurons_per_class: int = 10,
        dropout: tuple[float, float] = (0.5, 0.5),
        neuron: Neuron = paper_neuron,
        norm: bool = True,
        per_channel: bool = False,
        output_neuron: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(T=T, hidden=hidden, neurons_per_class=neurons_per_class)
        check_sizes(in_channels=in_channels, image_size=image_size)
        for width in chain(*stages):
            check_sizes(stages=width)
        check_flags(norm=norm, per_channel=per_channel, output_neuron=output_neuron)
        check(integer(2), classes=classes)
        if len(dropout) != 2 or not all(0 <= probability < 1 for probability in dropout):
            raise ValueError(f"dropout must be two probabilities in [0, 1), but it is {dropout!r}")
        side = image_size // 2 ** len(stages)
        if side < 1:
            raise ValueError(
                f"image_size={image_size} is too small for {len(stages)} stages, each of which "
                "halves it"
            )
        self.in_channels = in_channels
        self.image_size = image_size
        self.classes = classes
        self.T = T

        def node(channels: int) -> nn.Module:
            return make_neuron(neuron, **({"channels": channels} if per_channel else {}))

        features: list[nn.Module] = []
        channels = in_channels
        for widths in stages:
            for width in widths:
                features += [_convolution(channels, width, norm), node(width)]
                channels = width
            features.append(layer.SeqToANNContainer(nn.MaxPool2d(2)))
        self.stem, *features = features
        self.features = nn.Sequential(*features, nn.Flatten(2))
        self.head = nn.Sequential(
            layer.Dropout(dropout[0], step_mode="m"),
            nn.Linear(channels * side * side, hidden, bias=False),
            node(hidden),
            layer.Dropout(dropout[1], step_mode="m"),
            nn.Linear(hidden, classes * neurons_per_class, bias=False),
            node(classes * neurons_per_class),
        )
        if not output_neuron:
            del self.head[-1]

    def forward(self, x: Tensor, each_step: bool = False) -> Tensor:
        """Firing rates ``[N, classes]`` in [0, 1], or mean currents without output neurons.

        ``x`` is images ``[N, C, H, W]`` or frames ``[T, N, C, H, W]``. ``each_step`` returns the
        outputs of each time step, ``[T, N, classes]``, without their mean over time.
        """
        check_images(self, x, frames=True)
        if x.dim() == 5:
            x_seq = self.stem(x)
        else:
            # The same at every step, so its first convolution and norm are computed once.
            x_seq = self.stem(x.unsqueeze(0)).expand(self.T, -1, -1, -1, -1)
        reset(self)
        outputs = self.head(self.features(x_seq))
        reset(self)
        if each_step:
            return outputs.unflatten(2, (self.classes, -1)).mean(3)
        return outputs.mean(0).unflatten(1, (self.classes, -1)).mean(2)


def _convolution(in_channels: int, out_channels: int, norm: bool) -> nn.Module:
    """Convolution 3x3 and batch norm over time and batch together, on ``[T, N, C, H, W]``."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=not norm)
    return layer.SeqToANNContainer(conv, *([nn.BatchNorm2d(out_channels)] if norm else []))
