"""The LayerSkip recipe (arXiv 2404.16710): what training adds to a plain Llama.

- dropout.py: rates and masks of layer dropout (Eq. 1-4).
- exits.py: which exits are trained at a step, and their weights (Eq. 5-6).
- loss.py: the loss of a whole batch over all exits, J of Eq. 5. Start here.
- chunked.py: the loss of given states at several exits, one chunk of tokens at a time, over the mesh.
- cross_entropy.py: the loss of one exit on one chunk, and its gradient, as formulas.
"""
