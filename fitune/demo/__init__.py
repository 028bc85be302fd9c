"""`make demo`: a tiny base, and the whole job on it."""
