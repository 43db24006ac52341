"""Pallas kernels for the hot spots of LayerSkip decoding, each beside its plain-JAX reference.

This package imports nothing of lsjax, so it can be read, tested and reused on its own.
"""
