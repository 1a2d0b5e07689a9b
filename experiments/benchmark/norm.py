"""Count and time norms and neurons, apart and joined: ``python experiments/benchmark/norm.py``."""

from sj_taid.benchmark.norm import main

if __name__ == "__main__":
    main()
