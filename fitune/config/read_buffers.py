"""How much of a base is on its way at once while weights are read: two numbers with two readers.

`fitune.weights.streaming` allocates the buffers and `fitune.planning.memory` counts them. Neither may import the other:
plans are made without torch. So the numbers stand here, below both.
"""

CHUNK_BYTES = 64 * 2**20
"Of one read."
READ_BUFFERS = 4
"Reads that may wait to be placed: with CHUNK_BYTES, half a layer of 70B in NF4."
