"""A neuron's step: how it is read, and the loops and kernels that are made of it.

``reference.py`` is the definition of ALIF, and of what every faster path computes.
"""
