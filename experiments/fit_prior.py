"""Fit a prior to a finished run of ESVAE: ``python experiments/fit_prior.py checkpoint=RUN``."""

from sj_taid.training.cli import main

if __name__ == "__main__":
    main("fit_prior")
