"""A given model, or an adapter on its base, in memory: by plain transformers on one device, or over processes."""

import re
import warnings

import torch

from fitune.config.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fitune.config.schema import Run
from fitune.data.file_formats import first_line
from fitune.errors import UsageError, is_out_of_memory
from fitune.progress import bar
from fitune.training.distributed import hold_to_cap
from fitune.training.given_model import GivenModel
from fitune.training.train import load_sharded_model
from fitune.training.tuned import load_tuned_weights


def load_plain(given: GivenModel) -> torch.nn.Module:
    """By transformers and PEFT, on one device, weights as they are stored. UsageError where that cannot be."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # which counts tensors
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hold_to_cap(device)
    size = sum(file.stat().st_size for file in given.base.glob("*.safetensors"))
    try:
        with bar("reading the model", size, in_bytes=True) as advance:
            model = AutoModelForCausalLM.from_pretrained(
                given.base, dtype="auto", device_map=device, trust_remote_code=False, use_safetensors=True
            )
            advance(size)
    except (OSError, ValueError) as error:  # no safetensors, or an architecture that brings code of its own
        raise UsageError(f"{given.base}: cannot be loaded: {first_line(error)}") from None
    if given.is_adapter:
        model = _with_adapter(model, given)
    return model.eval()


def _with_adapter(model: torch.nn.Module, given: GivenModel) -> torch.nn.Module:
    """UsageError for an adapter that is not as its adapter_config.json says."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # between transformers and peft, not ours to mend
        warnings.filterwarnings("error", message=".*[Mm]issing adapter keys")  # it goes on without them
        try:
            return PeftModel.from_pretrained(model, given.folder)
        except UserWarning as missing:
            first, *others = re.findall(r"'([^']+)'", str(missing))
            more = f" and {len(others)} more" if others else ""
            raise UsageError(
                f"{given.folder}: PEFT cannot load it: {ADAPTER_WEIGHTS} lacks {first}{more}, which {ADAPTER_CONFIG} "
                f"asks for"
            ) from None
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            if is_out_of_memory(error):
                raise
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]  # the first may be a title
            why = next((line for line in lines if not line.endswith(":")), type(error).__name__)
            raise UsageError(f"{given.folder}: PEFT cannot load it: {why}") from None


def load_over_processes(run: Run, given: GivenModel, mesh) -> torch.nn.Module:
    """As `run`, which `model_run.run_to_ask` wrote, says. Call on all ranks."""
    model = load_sharded_model(run, given.base, given.tokenizer(), mesh, adapter=given.is_adapter)
    if given.is_adapter:
        load_tuned_weights(run, model, mesh)
    return model.eval()
