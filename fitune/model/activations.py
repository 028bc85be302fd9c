"""Which layers keep their activations for the backward pass, and which compute them again."""

from torch import nn

from fitune.model.host_inputs import HostInputs
from fitune.model.skeleton import decoder


def keep_activations(model: nn.Module, kept_layers: int, *, attention: bool = False, offload: bool = False) -> None:
    """The last `kept_layers` keep theirs, since the backward pass frees them first; the others keep their input.

    With `attention` the others keep attention's result, too. With `offload` what the others keep waits in host RAM.
    """
    layers = decoder(model).model.layers
    first_kept = max(0, len(layers) - kept_layers)
    host_inputs = HostInputs() if offload else None
    for number, layer in enumerate(layers):
        layer.keep, layer.keep_attention = number >= first_kept, attention
        layer.host_inputs = None if layer.keep else host_inputs
