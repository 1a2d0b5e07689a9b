"""What is no net, or no number of images, is an error that says what was expected."""

from contextlib import ExitStack

import pytest
import torch

import sj_taid
from sj_taid.model import ESVAE, FSVAE

NETS = {
    "accelerate": (),
    "calibrate": (torch.rand(2, 2, 2),),
    "fresh_state": (),
    "monitor": (),
    "name_neurons": (),
    "parameter_groups": (1e-3,),
    "swap_neurons": (),
    "to_lif": (),
    "unaccelerate": (),
}


@pytest.mark.parametrize("name", NETS)
def test_check_net_refuses_what_is_no_module(name):
    function = getattr(sj_taid, name)
    said = rf"{name} needs the net, a torch\.nn\.Module, but got"
    with pytest.raises(TypeError, match=said), ExitStack() as stack:
        stack.enter_context(function(torch.nn.Linear, *NETS[name]))  # which two of them need


def test_check_net_is_tested_for_every_function():
    functions = {n for n in sj_taid.__all__ if n[0].islower()}
    assert functions - set(NETS) == {"create_model", "known", "list_models"}


@pytest.mark.parametrize("kind", [ESVAE, FSVAE])
def test_sample_refuses_what_is_no_number_of_images(kind):
    model = kind(image_size=8, T=2, hidden_channels=(4,), latent_channels=4)
    for n in (-1, 2.0, True):
        with pytest.raises(ValueError, match="n must be an integer >= 0, but it is"):
            model.sample(n)
    for n in (0, 2):
        assert model.sample(n).shape == (n, 1, 8, 8)
