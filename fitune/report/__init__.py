"""The page of a run: one HTML file with curves, memory, answers, data, settings. Imports no torch."""
