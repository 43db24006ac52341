"""LayerSkip recipes trained side by side from the same seeds, with the cost and the gain of each."""
