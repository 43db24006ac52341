"""Training: one step, the loop around it, and the files it writes."""
