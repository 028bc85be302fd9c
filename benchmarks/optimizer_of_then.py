"""Which optimizer a measured run had, and which gradients, so that `plan` is asked for those."""

from dataclasses import replace

from fitune.planning.sizes import Setup


def with_its_optimizer(setup: Setup, entry: dict) -> Setup:
    """A result names both. The first ones don't: then the CPU computed AdamW of weights in host RAM.

    Nor do those in which all gradients of float32 weights were float32.
    """
    streamed, in_bf16 = entry.get("optimizer") == "AdamWStreamed", entry.get("gradients") == "bfloat16"
    return replace(setup, streams_adamw=streamed, takes_bf16_gradients=in_bf16)
