"""Repetition of n-grams, by comparing all with all."""


def brute_force(tokens, length):
    """Compares every n-gram with every earlier one, token by token."""
    starts = range(len(tokens) - length + 1)
    repeated = [any(all(tokens[i + k] == tokens[j + k] for k in range(length)) for j in range(i)) for i in starts]
    return sum(repeated) / len(repeated)
