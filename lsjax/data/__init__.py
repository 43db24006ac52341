"""Turns text into training batches: corpus, tokenizer, packing, Grain pipeline. Also renders chats."""
