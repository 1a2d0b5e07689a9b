"""What an installed wheel must do, without the checkout: ``python tests/smoke.py``."""

import torch
from spikingjelly.activation_based import functional, layer, neuron

import sj_taid
from sj_taid import doctor


def main() -> None:
    if doctor.main([]):
        raise SystemExit("a backend that should work gives other results than torch")
    net = torch.nn.Sequential(layer.Conv2d(1, 4, 3), layer.BatchNorm2d(4), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    x = torch.randn(4, 2, 1, 8, 8)
    plain = net(x)
    functional.reset_net(net)
    print(sj_taid.accelerate(net))
    torch.testing.assert_close(net(x), plain)
    for name in sj_taid.list_models():
        sj_taid.create_model(name, pretrained=True)
        print(f"{name} is loaded")


if __name__ == "__main__":
    main()
