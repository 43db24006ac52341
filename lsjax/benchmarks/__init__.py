"""Measurements of speed: decoding, training steps, kernels, and other libraries as baselines."""
