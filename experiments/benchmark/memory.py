"""Count the bytes that a neuron keeps for backward: ``python experiments/benchmark/memory.py``."""

from sj_taid.benchmark.memory import main

if __name__ == "__main__":
    main()
