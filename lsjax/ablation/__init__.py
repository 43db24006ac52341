"""Recipes trained side by side from the same seeds, and what each of them costs and gives."""
