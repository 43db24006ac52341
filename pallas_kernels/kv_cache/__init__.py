"""Two operations on a KV cache: write a few new tokens into it, and attend to it with a few queries.

Start with interface.py, which explains the layouts. reference.py is the plain-JAX version that every kernel must match.
"""
