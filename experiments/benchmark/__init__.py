"""Benchmarks: each script measures its rivals in one run and writes a CSV and a picture."""
