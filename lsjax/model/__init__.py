"""The Llama in functional Flax: layers, the functions that run them, and the forms that weights take.

Read transformer.py first.
"""
