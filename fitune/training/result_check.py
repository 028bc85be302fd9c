"""Whether what training wrote is what it trained: read back and compared, number by number."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from fitune.config.schema import Run
from fitune.errors import FituneError
from fitune.export.adapter import AdapterFile
from fitune.model.sharding import Share, local_rows
from fitune.training.distributed import machine_number
from fitune.training.result import as_on_disk, named_for_saving
from fitune.weights.safetensors_files import Checkpoint


def check_result(folder: Path, run: Run, model: nn.Module, share: Share) -> None:
    """Each rank that holds a part of the first copy compares its rows of `folder`'s tensors with the model's.

    They are rounded as `save_result` rounds them. Logits need no comparison then: nothing else was trained. Machines
    other than the first may not see the folder yet, and compare nothing. FituneError names the first tensor that is
    not as it was trained; the files stay.
    """
    if share.replica or machine_number():
        return
    with (AdapterFile if isinstance(model, PeftModel) else Checkpoint)(folder) as written:
        for parameter, spec in named_for_saving(model, run):
            start, stop = local_rows(spec.shape[0], share.shard, share.shards)
            if not torch.equal(written.read_rows(spec.name, start, stop), as_on_disk(parameter, spec)):
                raise FituneError(
                    f"{folder}: rows {start} to {stop} of {spec.name} are not as they were trained; the last "
                    f"checkpoint in {run.folder / 'checkpoints'} has them"
                )
