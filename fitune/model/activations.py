"""Which layers keep their activations for the backward pass, and which compute them again."""

from torch import nn

from fitune.model.host_inputs import HostInputs
from fitune.model.layer import DecoderLayer
from fitune.model.skeleton import decoder


def keep_activations(model: nn.Module, kept_layers: int, *, attention: bool = False, offload: bool = False) -> None:
    """The last `kept_layers` keep theirs, since the backward pass frees them first; the others keep their input.

    With `attention` the others keep attention's result, too; layers of transformers don't. With `offload` what the
    others keep waits in host RAM.
    """
    causal_lm = decoder(model)
    layers = causal_lm.model.layers
    first_kept = max(0, len(layers) - kept_layers)
    host_inputs = HostInputs() if offload else None
    if not isinstance(layers[0], DecoderLayer) and first_kept:
        causal_lm.activation_checkpointing_enable({"use_reentrant": False})
    for number, layer in enumerate(layers):
        keep = number >= first_kept
        if isinstance(layer, DecoderLayer):
            layer.keep, layer.keep_attention = keep, attention
            layer.host_inputs = None if keep else host_inputs
        elif keep:
            layer.gradient_checkpointing = False
        elif host_inputs:
            layer._gradient_checkpointing_func = host_inputs.around(layer._gradient_checkpointing_func)
