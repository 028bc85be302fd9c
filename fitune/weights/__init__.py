"""Weights between disk and memory: loaded, quantised, merged, a tensor at a time."""
