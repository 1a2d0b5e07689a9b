"""Time neurons over a grid of T, N and dtype: ``python experiments/benchmark/neuron.py``."""

from sj_taid.benchmark.neuron import main

if __name__ == "__main__":
    main()
