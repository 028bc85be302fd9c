"""How much of what is offloaded for the optimizer lies on the GPU at once: numbers with two readers.

`fitune.optimizers.host_states` and `fitune.optimizers.adamw_streamed` allocate them, `fitune.planning.memory` counts
them. Plans are made without torch, so none may import another.
"""

SLOTS = 4
"Pieces on the GPU at once: one comes in, one is worked on, one goes out, one is ready."
PIECE = 2**24
"Elements of a weight that travel together for 8-bit states: 32 MiB of gradients, as much of moments."
SLOT_BYTES = PIECE * (2 + 2 + 2 * 4 / 64)
"Gradients, codes of both moments, scales for each 64 of them."
IN_FLIGHT_BYTES = 2**29
"Of gradients that wait to leave the GPU, beside the one that came last."
FLOAT_PIECE = 2**22
"Elements that travel together for float32 states, of one weight or several: 16 MiB of each of their four numbers."
FLOAT_SLOT_BYTES = FLOAT_PIECE * 4 * 4
