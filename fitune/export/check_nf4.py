"""Whether an NF4 folder answers as its base does through NF4: the check at the end of `quantize`."""

import sys
from pathlib import Path

import torch

from fitune.config.stored_weights import EMBEDDING
from fitune.errors import FituneError
from fitune.export.adapter import Lora
from fitune.export.check import compare_written, not_computed, refuse_another_architecture
from fitune.export.prompts import prompts_for
from fitune.export.tuned_weights import TunedWeights
from fitune.weights.base_weights import read_base_config
from fitune.weights.round_trip import WeightsThroughNF4
from fitune.weights.safetensors_files import Checkpoint


def check_nf4(written: Path, base: Path, device: torch.device) -> None:
    """Compares the folder `written` with the weights of `base`, quantised anew on `device`, and prints what it found.

    Both hold the same numbers, so only the order of float32 sums may differ. FituneError beyond that.
    """
    if reason := not_computed(base):
        print(f"check: not checked: {reason}", file=sys.stderr)
        return
    refuse_another_architecture(written, base, changed=set())
    with Checkpoint(base) as checkpoint:
        through_nf4 = WeightsThroughNF4(checkpoint, device)
        expected = TunedWeights(through_nf4, Lora(), None, tied=bool(read_base_config(base).get("tie_word_embeddings")))
        prompts = prompts_for(written, None, expected.shapes[EMBEDDING][0])
        compared = compare_written(written, expected, torch.float32, prompts)
    said = compared.said("the base in NF4")
    if not compared.within_bound:
        raise FituneError(f"{said}: not the base's weights, so nothing is left of it")
    print(said, file=sys.stderr)
