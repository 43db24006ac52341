"""Writing a few new tokens into a KV cache, and attending to it with a few queries."""
