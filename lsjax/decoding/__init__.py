"""Decoding with one model and one KV cache: autoregressive, early exit, self-speculative."""
