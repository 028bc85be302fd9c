"""The three files of one small run, and the one line that a mistake in them is answered with."""

from pathlib import Path

import pytest

from fitune.config.run import resolve
from fitune.errors import UsageError

RECIPE = """\
description: A recipe.
base:
  model: some/model
data:
  dataset: some/rows
  prepared: data/rows
method: qlora
lora:
  r: 8
  target_modules: [q_proj, v_proj]
max_length: 512
global_batch_size: 8
training:
  learning_rate: 2e-4
  num_train_epochs: 1
"""
PROFILE = """\
description: A profile.
accelerate_config: ACCELERATE
num_gpus: 2
gpu_memory_gib: 24
host_memory_gib: 64
fits:
  8b: [qlora, lora]
micro_batch: 2
kept_layers: 0
"""
ACCELERATE = """\
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_offload_params: true
mixed_precision: bf16
num_processes: 2
"""


def message_of(paths: dict[str, Path], sets: tuple[str, ...] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(str(paths["recipe"]), str(paths["profile"]), sets)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    assert "Traceback" not in message and "pydantic" not in message
    return message
