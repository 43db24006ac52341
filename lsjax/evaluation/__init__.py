"""Quality on held-out text: how good each exit is (exits.py)."""
