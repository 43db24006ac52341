"""Llama in functional Flax."""
