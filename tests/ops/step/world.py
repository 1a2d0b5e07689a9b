"""A neuron that reads much of the world around it: :mod:`.test_read_again` edits it."""

import math
from functools import wraps
from math import sqrt

import torch
from spikingjelly.activation_based import surrogate

from tests.nets.own_neurons import Own, _Triangle

GAIN, LIST, TABLE = 1.5, [0.5], {"gain": 1.1}
squash, maths = torch.tanh, math


def helper(x, gain=1.1, *, offset=0.1):
    return x * gain + offset


def outer():
    value = 0.2

    def add(x):
        return (lambda y: y + value)(x)

    return add


def decorated(function):
    @wraps(function)
    def wrapper(self, v):
        return function(self, v) * 0.9

    return wrapper


add = outer()


@torch.jit.script
def by_script(x):
    return x * 1.2


class Config:
    type, gain = 1.0, 0.9


class Meta(type):
    @property
    def bias(cls):
        return 0.1


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1.1

    @staticmethod
    def backward(ctx, grad):
        return grad * 0.8


class Spike(surrogate.ATan):
    scale = 1.0

    @classmethod
    def width(cls):
        return 1.5

    def forward(self, x):
        return _Triangle.apply(x * self.scale, self.width())


class Parent(Own):
    def leak(self, v):
        return v * 0.5


class Neuron(Parent, metaclass=Meta):
    decay = 0.9

    def __init__(self):
        super().__init__(Spike())
        self.tilt = torch.nn.Parameter(torch.tensor(0.3))

    @property
    def rest(self):
        return 0.05

    def leak(self, v):
        return super().leak(v) * self.decay

    @decorated
    def fall(self, v):
        return v * 0.95

    def read_world(self, x):
        try:
            x = x * LATER
        except NameError:
            x = x * 1.3
        x = squash(x * GAIN * LIST[0] * TABLE["gain"] * max(1.0, 1.2)) + sqrt(0.01) + maths.pi / 9
        x = by_script(add(helper(x))) * Config.gain + Neuron.bias + type(self).decay
        return Scale.apply(x) + torch.sin(x) * 0.1 + x.sigmoid()

    def step(self, x, v):
        v = self.fall(self.leak(v)) + self.read_world(x * Config.type) * self.tilt + self.rest
        spike = self.surrogate_function(v - self.v_threshold)
        return spike, v - spike * self.v_threshold
