"""Weights between disk and memory: loaded and quantised, a tensor at a time."""
