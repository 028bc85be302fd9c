"""How much is computed at once: sizes that the model computes with and `fitune.planning.sizes` counts.

Neither may import the other: plans are made without torch. So the numbers stand here, below both.
"""

MLP_TILE = 16384
"Tokens of a layer's MLP: few enough for gate and up to be small beside a 70B layer, enough for full speed."
LOSS_TOKENS = 1024
"Tokens whose logits the loss has at a time: enough for products at full speed, 0.25 GiB of Llama 3's vocabulary."
LOSS_TOKENS_OF_A_TRAINED_HEAD = 4096
"The same where the head is trained: each time the head's gradient, in float32, is read and written."
NF4_BLOCK = 64
"Weights that share one scale in 4 bits: the default of bitsandbytes and QLoRA."
INPUT_AHEAD_BYTES = 2**28
"""What a layer needs from host RAM comes back while the layer after it computes, up to this size. More is that of long
rows: what is computed from it takes twenty times as long as it travels."""
