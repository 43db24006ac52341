"""Tasks that `lsjax evaluate` measures: prompts, references and scores."""
