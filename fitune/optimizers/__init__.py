"""AdamW on sharded weights, whole or in 8 bits, on the GPU or beside host RAM; the norm that gradients are held to."""
