"""Measuring a model: every exit on held-out text, tables and figures."""
