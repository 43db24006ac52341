"""Runs `lsjax benchmark_kernels` from a checkout; lsjax/cli/benchmark_kernels.py is the command."""

from lsjax.cli.main import launch

if __name__ == "__main__":
    launch("benchmark_kernels")
