"""Tensors that know how their values are made again; README.md draws their way through a net."""

# Whoever has the class of tensors has the rules of all functions of torch.
from . import functions as functions
from . import sums as sums
