"""Kernels for the hot spots of LayerSkip, each beside its plain-JAX reference. Imports nothing of lsjax."""
