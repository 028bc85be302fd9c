"""The model that is trained: its skeleton, its layers over frozen weights, its sharding."""
