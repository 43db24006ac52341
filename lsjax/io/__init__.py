"""Reads and writes models on disk: Hugging Face folders, GGUF files, training workdirs. Fetches them from the Hub.

`open.open_model` recognises what lies at a path and returns a `source.ModelSource`: the model's config, its tokenizer,
and the means to read its parameters. `convert.convert` writes a model in another format.
"""
