"""Which optimizer a measured run had, so that `plan` is asked for that one."""

from dataclasses import replace

from fitune.planning.sizes import Setup


def with_its_optimizer(setup: Setup, entry: dict) -> Setup:
    """A result names it. The first ones don't: then the CPU computed AdamW of weights in host RAM."""
    return replace(setup, streams_adamw=entry.get("optimizer") == "AdamWStreamed")
