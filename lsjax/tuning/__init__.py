"""The fastest setting of self-speculation, predicted from a few measurements."""
