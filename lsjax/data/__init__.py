"""Corpora, tokenizers, packing, and the Grain pipeline."""
