"""A neuron's step: how it is read, and the text of the loops that is made of it."""
