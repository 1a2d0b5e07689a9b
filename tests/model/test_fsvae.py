"""FSVAE: shapes, state, gradients, the neurons it takes, errors."""

from functools import partial

import pytest
import torch
from spikingjelly.activation_based import functional
from torch._dynamo.testing import CompileCounterWithBackend

from sj_taid import TAID, ALIFNode, FixedDecoder
from sj_taid.model import FSVAE
from sj_taid.model.latent import Prior
from sj_taid.model.spiking_vae import original_neuron
from tests.model.conftest import (
    assert_every_parameter_learns,
    images,
    lif,
    plif,
    without_running_statistics,
)

SMALL = {"image_size": 8, "T": 8, "hidden_channels": (6, 12), "latent_channels": 10, "k": 4}

frozen_alif = partial(original_neuron, learn_tau=False, learn_threshold=False)


def run(model, image, seed=0):
    torch.manual_seed(seed)
    return model(image, 0.3)


@pytest.mark.parametrize(
    ("options", "size"), [({"image_size": 32}, 32), ({"image_size": 64, "in_channels": 3}, 64)]
)
def test_the_originals_sizes(options, size):
    model = FSVAE(T=2, **options).eval()
    channels = options.get("in_channels", 1)
    with torch.no_grad():
        output = model(images(1, channels, size))
    assert output.image.shape == (1, channels, size, size)
    assert output.q.shape == output.p.shape == (2, 1, 128, 20)
    assert model.encoder[-1][0][0].out_channels == (256 if size == 32 else 512)
    assert output.image.abs().max() <= 1


@pytest.mark.parametrize("training", [True, False])
def test_two_calls_in_a_row_never_mix(training):
    model = without_running_statistics(FSVAE(**SMALL).train(training))
    image = images()
    first = run(model, image)
    run(model, images(5))
    again = run(model, image)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("latent_loss", ["mmd", "kl"])
@pytest.mark.parametrize("make_decoder", [TAID, partial(TAID, squeeze="all"), FixedDecoder])
def test_every_parameter_learns(make_decoder, latent_loss):
    model = FSVAE(**SMALL, decoder=make_decoder(SMALL["T"]), latent_loss=latent_loss)
    losses = model.training_loss(images(8), progress=1.0)
    assert_every_parameter_learns(model, losses)


@pytest.mark.parametrize("training", [True, False])
def test_frozen_alif_at_the_originals_values_equals_lif(training):
    alif = FSVAE(**SMALL, neuron=frozen_alif).double().train(training)
    original = FSVAE(**SMALL, neuron=lif).double().train(training)
    original.load_state_dict(
        {k: v for k, v in alif.state_dict().items() if not k.endswith((".w", ".v_threshold"))}
    )
    image = images(8).double()
    for a, b in zip(run(alif, image), run(original, image), strict=True):
        assert torch.equal(a, b)
    torch.manual_seed(1)
    sampled = alif.sample(4)
    torch.manual_seed(1)
    assert torch.equal(sampled, original.sample(4))


@pytest.mark.parametrize("make", [lif, plif, frozen_alif])
def test_takes_any_spikingjelly_neuron(make):
    model = FSVAE(**SMALL, neuron=make)
    image = images()
    model.loss(image, model(image))["loss"].backward()
    assert model.sample(2).shape == (2, 1, 8, 8)


def test_static_first_layer_equals_repeating_the_image():
    model = FSVAE(**SMALL).double().eval()
    image = images().double()
    expected = model.encode(image)
    x_seq = image.expand(SMALL["T"], *image.shape)
    functional.reset_net(model)
    repeated = model.to_latent(model.encoder(model.stem(x_seq)).flatten(2))
    assert torch.equal(repeated, expected)


def test_sample_needs_no_mode_and_changes_nothing():
    model = FSVAE(**SMALL)
    model(images())
    frozen = model.decoder[0][0][1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    drawn = model.sample(5)
    assert drawn.shape == (5, 1, 8, 8) and not drawn.requires_grad
    assert model.training and model.prior.net.training and not frozen.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_compiled_graphs_serve_all_epochs(monkeypatch):
    torch.compiler.reset()
    passes = []
    insert = Prior._insert_own_samples
    monkeypatch.setattr(
        Prior, "_insert_own_samples", lambda *given: passes.append(given) or insert(*given)
    )
    model = FSVAE(
        image_size=4,
        T=Prior.FIRST_OWN_SAMPLE + 2,  # the shortest in which one of these is an input
        hidden_channels=(2,),
        latent_channels=2,
        k=2,
        own_sample_probability=(0.0, 1.0),
    )
    counter = CompileCounterWithBackend("eager")
    model.compile(backend=counter, dynamic=False)
    graphs = []
    for progress in (0.0, 1.0, 1.0):
        model.train().training_loss(images(2, size=4), progress)["loss"].backward()
        with torch.no_grad():
            model.eval()(images(2, size=4))
        graphs.append(counter.frame_count)
    assert graphs[0] > 0 and graphs == graphs[:1] * 3
    assert len(passes) == 2, "the prior takes samples of its own in all epochs but the first"


def test_a_pass_leaves_the_neurons_at_rest():
    model = FSVAE(**SMALL)
    model(images(2), own_sample_probability=1.0)
    model.sample(2)
    neurons = [m for m in model.modules() if isinstance(m, ALIFNode)]
    assert neurons and all(node.v == node.v_reset for node in neurons)


def test_learns_to_reconstruct():
    torch.manual_seed(0)
    model = FSVAE(**SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    image = images(4)
    errors = []
    for _ in range(40):
        losses = model.loss(image, model(image))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        errors.append(losses["reconstruction"].item())
    assert errors[-1] < 0.7 * errors[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 9}, "image_size=9 cannot be halved 1 times"),
        ({"image_size": 12, "hidden_channels": (4, 4, 4)}, "cannot be halved 3 times"),
        ({"image_size": 8, "hidden_channels": ()}, "cannot be halved 0 times"),
        ({"T": 4, "decoder": TAID(8)}, "the image decoder was made for T=8, the model for T=4"),
        ({"k": 0}, "k must be an integer >= 1, but it is 0"),
        ({"own_sample_probability": (10, 30)}, r"must be two probabilities in \[0, 1\], but it is"),
        ({"own_sample_probability": (0.1,)}, "must be two probabilities"),
        ({"own_sample_probability": 0.1}, "must be two probabilities"),
        ({"neuron": ALIFNode}, "neurons in step mode 'm', but ALIFNode is in 's'"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        FSVAE(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder": TAID}, r"decoder must be an image decoder, such as TAID\(16\)"),
        ({"neuron": ALIFNode(step_mode="m")}, "neuron must make a neuron each time it is called"),
    ],
)
def test_what_is_no_part_of_a_model(options, message):
    with pytest.raises(TypeError, match=message):
        FSVAE(**options)


@pytest.mark.parametrize("shape", [(2, 1, 8), (2, 3, 8, 8), (2, 1, 16, 16)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r"FSVAE expects images \[N, 1, 8, 8\], but got"):
        FSVAE(**SMALL)(torch.zeros(shape))


def test_unknown_latent_loss():
    with pytest.raises(ValueError, match="latent_loss must be one of mmd, kl"):
        FSVAE(**SMALL, latent_loss="wasserstein")


def test_scheduled_sampling_follows_the_progress(monkeypatch):
    model = FSVAE(**SMALL, own_sample_probability=(0.1, 0.3))
    used = []
    original = model.prior.forward
    monkeypatch.setattr(model.prior, "forward", lambda z, p: used.append(p) or original(z, p))
    for progress in (0.0, 0.5, 1.0):
        model.training_loss(images(), progress)
    assert used == pytest.approx([0.1, 0.2, 0.3])
