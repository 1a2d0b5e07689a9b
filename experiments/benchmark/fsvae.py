"""Time a training step and sampling of FSVAE: ``python experiments/benchmark/fsvae.py``."""

from sj_taid.benchmark.fsvae import main

if __name__ == "__main__":
    main()
