"""What a run needs and how long it takes. Imports no torch."""
