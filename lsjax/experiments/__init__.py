"""Whole experiments: the demo, continual training of a real model, sweeps and ablations."""
