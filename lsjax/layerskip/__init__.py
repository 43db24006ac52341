"""The LayerSkip recipe: layer dropout, exit weights and curricula, the multi-exit loss."""
