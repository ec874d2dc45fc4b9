"""Benchmarks: each prints a figure beside what it is compared with, measured in the same run."""
