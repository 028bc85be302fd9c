"""How much is computed at once: sizes that the model computes with and `fitune.planning.sizes` counts.

Neither may import the other: plans are made without torch. So the numbers stand here, below both.
"""

MLP_TILE = 16384
"Tokens of a layer's MLP: few enough for gate and up to be small beside a 70B layer, enough for full speed."
VOCABULARY_TILE = 32768
"Columns of the logits that the loss multiplies at a time, as in TRL."
NF4_BLOCK = 64
"Weights that share one scale in 4 bits: the default of bitsandbytes and QLoRA."
