"""Operators: the backends of neurons, surrogate derivatives, spikes as bits."""

import os

#: The process that imported this; a forked child has another id, and none of its threads.
PROCESS = os.getpid()
