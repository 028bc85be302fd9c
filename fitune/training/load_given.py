"""A given model, or an adapter on its base, in memory: by plain transformers on one device, or over processes."""

import re
import sys
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError

from fitune.config.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from fitune.config.schema import Run
from fitune.data.file_formats import first_line
from fitune.errors import FituneError, UsageError, is_out_of_memory
from fitune.progress import bar
from fitune.training.distributed import hold_to_cap
from fitune.training.given_model import GivenModel
from fitune.training.train import load_sharded_model
from fitune.training.tuned import load_tuned_weights
from fitune.weights.safetensors_files import read_header


def load_plain(given: GivenModel) -> torch.nn.Module:
    """By transformers and PEFT, on one device, weights as they are stored. UsageError where that cannot be,
    FituneError for a damaged file.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()  # which counts tensors
    logging.set_verbosity_error()  # its table of other tensors is told in one line, below
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hold_to_cap(device)
    size = sum(file.stat().st_size for file in given.base.glob("*.safetensors"))
    try:
        with bar("reading the model", size, in_bytes=True) as advance:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                given.base, dtype="auto", device_map=device, trust_remote_code=False, use_safetensors=True,
                output_loading_info=True, ignore_mismatched_sizes=True,
            )  # fmt: skip
            advance(size)
    except (OSError, ValueError) as error:  # no safetensors, or an architecture that brings code of its own
        raise UsageError(f"{given.base}: cannot be loaded: {first_line(error)}") from None
    except SafetensorError as error:
        for file in sorted(given.base.glob("*.safetensors")):
            read_header(file)  # which names the file that is damaged
        raise FituneError(f"{given.base}: cannot be loaded: {first_line(error)}") from None
    _refuse_other_tensors(given.base, loaded)
    if given.is_adapter:
        model = _with_adapter(model, given)
    return model.eval()


def _refuse_other_tensors(folder: Path, loaded: dict) -> None:
    """FituneError where tensors lack or have other shapes, which transformers fills with random numbers.

    What has no place in the model is left out, as transformers does, and that is said.
    """
    if missing := sorted(loaded["missing_keys"]):
        raise FituneError(f"{folder}: tensor {missing[0]} is missing{_more(missing)}")
    if others := sorted(loaded["mismatched_keys"]):
        name, stored, needed = others[0]
        raise FituneError(
            f"{folder}: tensor {name} has shape {tuple(stored)}, the model needs {tuple(needed)}{_more(others)}; "
            "config.json belongs to another model?"
        )
    if surplus := sorted(loaded["unexpected_keys"]):
        print(f"note: {folder}: tensor {surplus[0]} has no place in the model, and is left out{_more(surplus)}; "
              "config.json belongs to another model?", file=sys.stderr)  # fmt: skip


def _more(tensors: list) -> str:
    return f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""


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
            instead = "; merge it, and give the merged model's folder" if "size mismatch" in why else ""
            raise UsageError(f"{given.folder}: PEFT cannot load it: {why}{instead}") from None


def load_over_processes(run: Run, given: GivenModel, mesh) -> torch.nn.Module:
    """As `run`, which `model_run.run_to_ask` wrote, says. Call on all ranks."""
    model = load_sharded_model(run, given.base, given.tokenizer(), mesh, adapter=given.is_adapter)
    if given.is_adapter:
        load_tuned_weights(run, model, mesh)
    return model.eval()
