"""Costs of computation: FLOPs of training and decoding (flops.py), and the peaks of hardware (hardware.py)."""
