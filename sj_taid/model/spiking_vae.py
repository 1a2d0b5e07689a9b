"""Base class of the spiking generators: encoder, decoder and image decoder around a latent."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn
from torch.nn import functional as F

from .._internal.checks import check, check_flags, check_not_negative, check_sizes, integer
from .._internal.context import eval_mode
from ..layer import TAID
from ..neuron import ALIFNode
from ..ops.surrogate import Rect
from .block import Neuron, check_images, check_labels, encoder_shape, reset, spiking_block

#: ALIF that starts as the neuron of the original FSVAE: V[t] = 0.25 V[t-1] + X, threshold 0.2 and a
#: rectangular surrogate of width and height 1.
original_neuron = partial(
    ALIFNode,
    init_tau=4 / 3,
    decay_input=False,
    v_threshold=0.2,
    v_reset=0.0,
    surrogate_function=Rect(alpha=1.0),
    step_mode="m",
)


class SubpixelConv2d(nn.Conv2d):
    """Convolution 3x3 to twice the height and width, four pixels per position.

    The four have equal weights at the start (Aitken et al. 2017, arXiv 1707.02937) and one bias, or
    images get stripes.

    Args:
        in_channels, out_channels: of the images ``[N, C, H, W]``.
    """

    bias: nn.Parameter

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.weight = nn.Parameter(self.weight.detach().repeat_interleave(4, 0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias.repeat_interleave(4), padding=1)
        return F.pixel_shuffle(x, 2)


class SpikingVAEOutput(NamedTuple):
    """The reconstruction and both latent distributions, of a shape that the model says."""

    image: Tensor  #: ``[N, C, H, W]`` in [-1, 1]
    q: Tensor  #: the posterior's, of the image
    p: Tensor  #: the prior's


class SpikingVAE(nn.Module):
    """Spiking autoencoder of images; its subclasses FSVAE and ESVAE define the latent.

    The image is the input current of every time step. Encoder: convolutions 3x3 of stride 2, each
    with tdBN and a neuron, then a spiking linear layer to the latent channels. Decoder: the mirror
    image, and a last convolution 3x3 without neuron, which makes four pixels per position. Its
    output ``[T, N, C, H, W]`` becomes one image by the image decoder, then tanh.

    Every pass starts from rest and leaves the neurons at rest; :func:`sj_taid.monitor` sees their
    activity.

    Args:
        in_channels: image channels C.
        image_size: height and width H = W, an even number.
        T: number of time steps.
        hidden_channels: width of the encoder's first block; widths double until 2x2 pixels or an
            odd side are left. The default gives the original's for 32x32 and for 64x64.
        latent_channels: width of the latent spike train.
        neuron: makes a neuron; any SpikingJelly neuron in step mode ``"m"``.
        image_decoder: :class:`~sj_taid.TAID` (default) or :class:`~sj_taid.FixedDecoder`, made for
            the same T.
        subpixel: end in a convolution at half resolution that makes four pixels per position (Shi
            et al. 2016, arXiv 1609.05158). False is the published decoder, a transposed block to
            full resolution and a convolution there.
        gradient_weight: weight of the mean absolute error of differences of neighbouring pixels,
            next to the squared error, for sharper images (Mathieu et al. 2016, arXiv 1511.05440,
            with signed differences).
        chroma_weight: weight of the squared error of colour, each channel's error less the mean of
            the three, next to the squared error; for photographs (``RESULTS.md``).

    Raises:
        TypeError: ``neuron`` makes none.
        ValueError: sizes that do not fit, or images of another shape; outside training also
            values beyond [-1, 1] or NaN.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 32,
        T: int = 16,
        hidden_channels: int = 32,
        latent_channels: int = 128,
        neuron: Neuron = original_neuron,
        image_decoder: nn.Module | None = None,
        subpixel: bool = True,
        gradient_weight: float = 0.0,
        chroma_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(in_channels=in_channels, T=T, latent_channels=latent_channels)
        check_not_negative(gradient_weight=gradient_weight, chroma_weight=chroma_weight)
        check_flags(subpixel=subpixel)
        if chroma_weight and in_channels != 3:
            raise ValueError(
                f"chroma_weight={chroma_weight} is for images of 3 channels, but in_channels is "
                f"{in_channels}; set chroma_weight=0"
            )
        widths, side = encoder_shape(hidden_channels, image_size)
        image_decoder = TAID(T) if image_decoder is None else image_decoder
        if getattr(image_decoder, "T", None) != T or not isinstance(image_decoder, nn.Module):
            raise ValueError(
                f"image_decoder must be for T={T}, as TAID({T}) is, but it is {image_decoder!r:.80}"
            )
        self.in_channels = in_channels
        self.image_size = image_size
        self.T = T
        self.latent_channels = latent_channels
        self.gradient_weight = gradient_weight
        self.chroma_weight = chroma_weight

        self._code_shape = (widths[-1], side, side)
        code = widths[-1] * side * side
        halve = partial(nn.Conv2d, kernel_size=3, stride=2, padding=1)
        double = partial(nn.ConvTranspose2d, kernel_size=3, stride=2, padding=1, output_padding=1)
        (self.stem, first_neuron), *blocks = (
            spiking_block(halve(a, b), neuron) for a, b in pairwise((in_channels, *widths))
        )
        self.encoder = nn.Sequential(first_neuron, *blocks)
        self.to_latent = spiking_block(nn.Linear(code, latent_channels), neuron)
        self._make_latent(neuron)  # here, since the order sets the random weights
        self.from_latent = spiking_block(nn.Linear(latent_channels, code), neuron)
        reverse = (*reversed(widths), *(() if subpixel else widths[:1]))
        self.decoder = nn.Sequential(
            *(spiking_block(double(a, b), neuron) for a, b in pairwise(reverse))
        )
        last = SubpixelConv2d if subpixel else partial(nn.ConvTranspose2d, kernel_size=3, padding=1)
        self.to_image = layer.SeqToANNContainer(last(widths[0], in_channels))
        self.image_decoder = image_decoder

    def _make_latent(self, neuron: Neuron) -> None:
        """Make the subclass's modules between encoder and decoder."""
        raise NotImplementedError

    def encode(self, image: Tensor) -> Tensor:
        """The encoder's spikes ``[T, N, latent]`` for ``image`` ``[N, C, H, W]``."""
        check_images(self, image)
        # The image is the same at every step, so its first convolution and norm are too.
        x_seq = self.stem(image.unsqueeze(0)).expand(self.T, -1, -1, -1, -1)
        reset(self.encoder, self.to_latent)
        latent_seq = self.to_latent(self.encoder(x_seq).flatten(2))
        reset(self.encoder, self.to_latent)
        return latent_seq

    def latent_spikes(self, image: Tensor) -> Tensor:
        """Draw the decoder's input ``[T, N, latent]`` for ``image`` ``[N, C, H, W]``."""
        raise NotImplementedError

    def decode(self, z_seq: Tensor) -> Tensor:
        """The image ``[N, C, H, W]`` in [-1, 1] for latent spikes ``[T, N, latent]``."""
        return self.image_decoder(self.decode_sequence(z_seq)).tanh()

    def decode_sequence(self, z_seq: Tensor) -> Tensor:
        """The image decoder's input ``[T, N, C, H, W]`` for latent spikes ``[T, N, latent]``."""
        reset(self.from_latent, self.decoder)
        x_seq = self.from_latent(z_seq).unflatten(2, self._code_shape)
        image_seq = self.to_image(self.decoder(x_seq))
        reset(self.from_latent, self.decoder)
        return image_seq

    def sum_losses(self, output: Tensor, image: Tensor, latent: Tensor) -> dict[str, Tensor]:
        """``loss``, its terms, the errors of images ``[N, C, H, W]`` and ``latent``, and ``image``.

        ``image`` is the reconstruction, ``output``, for further terms.
        """
        terms = {"reconstruction": F.mse_loss(output, image), "latent": latent}
        if self.gradient_weight:
            height, width = (F.l1_loss(output.diff(dim=k), image.diff(dim=k)) for k in (2, 3))
            terms["gradient"] = self.gradient_weight * (height + width)
        if self.chroma_weight:
            error = output - image
            chroma = error - error.mean(1, keepdim=True)
            terms["chroma"] = self.chroma_weight * chroma.square().mean()
        return {"loss": torch.stack([*terms.values()]).sum(), **terms, "image": output}

    @property
    def labels(self) -> list[int]:
        """The classes that :meth:`sample` can be asked for, which a labelled flow has."""
        return []

    def sample(self, n: int, label: int | Sequence[int] | Tensor | None = None) -> Tensor:
        """Draw ``n`` images ``[n, C, H, W]`` in [-1, 1] from the prior.

        Without gradient and in eval mode; after, every module is back in its own mode.

        Args:
            n: number of images.
            label: their class, or one for each, out of ``labels``. None draws classes by
                their share in the training images.

        Raises:
            ValueError: ``n`` is no integer >= 0, or ``label`` is none of ``labels``.
        """
        check(integer(0), n=n)
        labels = None
        if label is not None:
            expected = (
                f"label must be one of {self.labels}, or a list of {n} of them; an ESVAE's flow "
                "learns them by model.fit_prior(images, labels=...), or comes with pretrained=True"
            )
            labels = check_labels(label, n, self.labels, expected)
        with eval_mode(self), torch.no_grad():
            return self.decode(self.sample_latent(n, labels))

    def sample_latent(self, n: int, labels: Tensor | None = None) -> Tensor:
        """Draw latent spikes ``[T, n, latent]`` from the prior, of the classes in ``labels``."""
        raise NotImplementedError

    def reconstruct(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` encoded and decoded again; in eval mode, without gradient."""
        with eval_mode(self), torch.no_grad():
            return self(images).image
