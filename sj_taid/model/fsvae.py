"""Fully Spiking VAE: an image goes in, spikes carry it through, an image comes out."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from spikingjelly.activation_based import layer, surrogate
from torch import Tensor, nn
from torch.nn import functional as F

from ..layer import TAID
from ..neuron import ALIFNode
from ..norm import fuse_norm
from .block import (
    Neuron,
    conv_block,
    conv_transpose_block,
    encoder_widths,
    evaluating,
    halved,
    linear_block,
    reset,
)
from .latent import LATENT_LOSSES, Posterior, Prior

#: ALIF that starts as the original's neuron: V[t] = 0.25 V[t-1] + X, threshold 0.2 and a
#: rectangular surrogate of width 1 (SpikingJelly's two lines share this spelling of it).
original_neuron = partial(
    ALIFNode,
    init_tau=4 / 3,
    decay_input=False,
    v_threshold=0.2,
    v_reset=0.0,
    surrogate_function=surrogate.PiecewiseLeakyReLU(w=0.5, c=0.0),
    step_mode="m",
)


class FSVAEOutput(NamedTuple):
    """What a pass gives: the reconstruction and both latent distributions."""

    image: Tensor  #: ``[N, C, H, W]`` in [-1, 1]
    q: Tensor  #: posterior candidates ``[T, N, latent, k]``
    p: Tensor  #: prior candidates ``[T, N, latent, k]``


class FSVAE(nn.Module):
    """Fully Spiking VAE with a learned or fixed image decoder.

    The image is the input current of every time step. Encoder: 3x3 convolutions of stride 2, each
    with tdBN and a neuron, then a spiking linear layer to the latent channels. Posterior and prior:
    :mod:`sj_taid.model.latent`. Decoder: the mirror image, a stride-2 block to full resolution and
    a last 3x3 convolution without neuron, whose sequence ``[T, N, C, H, W]`` the image decoder
    turns into one image; tanh.

    Every pass starts from rest, so that two calls in a row never mix, and leaves the neurons at
    rest: :func:`sj_taid.monitor` or a forward hook sees what they did.

    Args:
        in_channels: image channels C.
        image_size: height and width H = W, divisible by two once for each hidden width.
        T: number of time steps.
        hidden_channels: widths of the encoder, or the first: it doubles until 2x2 pixels are left.
            The default gives the original's for 32x32 and for 64x64.
        latent_channels: width of the latent spike train.
        k: candidate spikes for each latent channel.
        neuron: makes a neuron; any SpikingJelly neuron in step mode ``"m"``.
        decoder: the image decoder, :class:`~sj_taid.TAID` (default) or
            :class:`~sj_taid.FixedDecoder`, made for the same T.
        presampling: see :class:`~sj_taid.model.latent.Posterior`.
        latent_loss: the distance of posterior and prior, ``"mmd"`` or ``"kl"``.
        own_sample_probability: the prior's scheduled sampling at the start and at the end of
            training.
        fused_norm: let ALIF neurons apply the norm before them: :func:`sj_taid.fuse_norm`.

    Raises:
        ValueError: sizes that do not fit, or images of another shape.

    Source: Kamata et al. 2022, arXiv 2110.00375; the image decoder from Qiu et al. 2023,
    arXiv 2406.03046.

    >>> model = FSVAE(image_size=8, T=4, hidden_channels=(4, 8), latent_channels=6, k=3)
    >>> output = model(torch.rand(2, 1, 8, 8))
    >>> output.image.shape, output.q.shape, model.sample(5).shape
    (torch.Size([2, 1, 8, 8]), torch.Size([4, 2, 6, 3]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 32,
        T: int = 16,
        hidden_channels: int | Sequence[int] = 32,
        latent_channels: int = 128,
        k: int = 20,
        neuron: Neuron = original_neuron,
        decoder: nn.Module | None = None,
        presampling: str = "step",
        latent_loss: str = "mmd",
        own_sample_probability: tuple[float, float] = (0.1, 0.3),
        fused_norm: bool = True,
    ) -> None:
        super().__init__()
        if latent_loss not in LATENT_LOSSES:
            raise ValueError(
                f"latent_loss must be one of {', '.join(LATENT_LOSSES)}, but it is {latent_loss!r}"
            )
        widths = encoder_widths(hidden_channels, image_size)
        decoder = TAID(T) if decoder is None else decoder
        if decoder.T != T:
            raise ValueError(f"the image decoder was made for T={decoder.T}, the model for T={T}")
        self.in_channels = in_channels
        self.image_size = image_size
        self.T = T
        self.latent_channels = latent_channels
        self.k = k
        self.latent_loss = latent_loss
        self.own_sample_probability = tuple(own_sample_probability)

        side = halved(image_size, widths)
        self._code_shape = (widths[-1], side, side)
        code = widths[-1] * side * side
        (self.stem, first_neuron), *blocks = (
            conv_block(a, b, neuron) for a, b in pairwise((in_channels, *widths))
        )
        self.encoder = nn.Sequential(first_neuron, *blocks)
        self.to_latent = linear_block(code, latent_channels, neuron)
        self.posterior = Posterior(latent_channels, k, neuron, presampling)
        self.prior = Prior(latent_channels, k, neuron)
        self.from_latent = linear_block(latent_channels, code, neuron)
        reverse = (*reversed(widths), widths[0])
        self.decoder = nn.Sequential(
            *(conv_transpose_block(a, b, neuron) for a, b in pairwise(reverse))
        )
        self.to_image = layer.SeqToANNContainer(
            nn.ConvTranspose2d(widths[0], in_channels, 3, padding=1)
        )
        self.image_decoder = decoder
        if fused_norm:
            fuse_norm(self)

    def forward(self, image: Tensor, own_sample_probability: float | Tensor = 0.0) -> FSVAEOutput:
        """Reconstruct ``image`` ``[N, C, H, W]`` in [-1, 1].

        ``own_sample_probability`` is the prior's scheduled sampling, used in training.
        """
        x_seq = self.encode(image)
        z_seq, q = self.posterior(x_seq, self._picks(len(image)))
        p = self.prior(z_seq, own_sample_probability)
        return FSVAEOutput(self.decode(z_seq), q, p)

    def encode(self, image: Tensor) -> Tensor:
        """The encoder's spikes ``[T, N, latent]`` for ``image`` ``[N, C, H, W]``."""
        expected = (self.in_channels, self.image_size, self.image_size)
        if image.dim() != 4 or image.shape[1:] != expected:
            raise ValueError(
                f"FSVAE expects images [N, {', '.join(map(str, expected))}], "
                f"but got {list(image.shape)}"
            )
        # The image is the same at every step, so its first convolution and norm are too.
        x_seq = self.stem(image.unsqueeze(0)).expand(self.T, -1, -1, -1, -1)
        reset(self.encoder, self.to_latent)
        latent_seq = self.to_latent(self.encoder(x_seq).flatten(2))
        reset(self.encoder, self.to_latent)
        return latent_seq

    def decode(self, z_seq: Tensor) -> Tensor:
        """The image ``[N, C, H, W]`` in [-1, 1] for latent spikes ``[T, N, latent]``."""
        return self.image_decoder(self.decode_sequence(z_seq)).tanh()

    def decode_sequence(self, z_seq: Tensor) -> Tensor:
        """What the image decoder weighs: ``[T, N, C, H, W]`` for ``[T, N, latent]``."""
        reset(self.from_latent, self.decoder)
        x_seq = self.from_latent(z_seq).unflatten(2, self._code_shape)
        image_seq = self.to_image(self.decoder(x_seq))
        reset(self.from_latent, self.decoder)
        return image_seq

    def sample(self, n: int) -> Tensor:
        """Draw ``n`` images ``[n, C, H, W]`` in [-1, 1] from the prior.

        Without gradient and in eval mode; after, every module is back in the mode it was in.
        """
        with evaluating(self), torch.no_grad():
            return self.decode(self.prior.sample(self._picks(n)))

    def loss(self, image: Tensor, output: FSVAEOutput) -> dict[str, Tensor]:
        """``loss = reconstruction + latent``: squared error, and MMD or 1e-4 KL of q and p."""
        distance, weight = LATENT_LOSSES[self.latent_loss]
        reconstruction = F.mse_loss(output.image, image)
        latent = weight * distance(output.q, output.p)
        return {"loss": reconstruction + latent, "reconstruction": reconstruction, "latent": latent}

    def training_loss(self, image: Tensor, progress: float = 0.0) -> dict[str, Tensor]:
        """The loss of a pass; ``progress`` of the training, 0 to 1, sets the scheduled sampling."""
        first, last = self.own_sample_probability
        # A tensor: compiled, each float would be a constant of a graph of its own.
        probability = torch.tensor(first + (last - first) * progress)
        return self.loss(image, self(image, probability))

    def _picks(self, n: int) -> Tensor:
        device = next(self.parameters()).device
        return torch.randint(self.k, (self.T, n, self.latent_channels), device=device)
