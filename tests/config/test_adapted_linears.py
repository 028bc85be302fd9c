"""Which linears get an adapter: what is refused before anything is loaded, and what PEFT makes of the rest."""

import pytest
import torch
from peft.tuners.lora import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fitune.config.adapted_linears import LINEARS, adapted_linears
from fitune.config.base_model import check_base_model
from fitune.config.model_shapes import LLAMA_3_FAMILY
from fitune.config.recipe import Lora
from fitune.errors import UsageError
from fitune.launching.preflight import check_before_training
from fitune.planning.plan import make_plan

REFUSED = ["lm_head", "embed_tokens", "model.embed_tokens", "q_prj", "self_attn", "norm", "mlp.q_proj", "proj", ""]
TAKEN = {
    "up_proj": "up_proj",
    "mlp.down_proj": "down_proj",
    "1.self_attn.k_proj": "k_proj",
    "model.layers.1.mlp.gate_proj": "gate_proj",
}


def test_all_linears_are_those_of_the_model():
    assert adapted_linears(Lora(), 80) == LINEARS == set(LLAMA_3_FAMILY["Llama-3.3-70B"].linears)


@pytest.mark.parametrize("target", [*REFUSED, *TAKEN, "layers"])
def test_what_is_taken_is_what_peft_finds_in_the_layers(target):
    """A target that finds nothing is refused too: beside others PEFT leaves it out without a word."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2))
    config = LoraConfig(target_modules=[target])
    found = {name: part for name, part in model.named_modules() if check_target_module_exists(config, name)}
    in_layers = [isinstance(part, nn.Linear) and name.startswith("model.layers.") for name, part in found.items()]
    if in_layers and all(in_layers):
        assert adapted_linears(Lora(target_modules=[target]), 2) == {name.rpartition(".")[2] for name in found}
        return
    with pytest.raises(UsageError, match=f"'{target}' is not a linear of a layer"):
        adapted_linears(Lora(target_modules=[target]), 2)


def test_the_cases_above_are_of_both_kinds():
    found = [adapted_linears(Lora(target_modules=[target]), 2) for target in TAKEN]
    assert found == [{name} for name in TAKEN.values()]


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ([], "lora.target_modules is empty; allowed: all-linear, or some of down_proj, gate_proj"),
        (["q_proj", "layers.2.mlp.up_proj"], "'layers.2.mlp.up_proj': no layer 2; allowed: 0 to 1"),
        (["q_proj", "layers.01.mlp.up_proj"], "'layers.01.mlp.up_proj': no layer 01; allowed: 0 to 1"),
    ],
)
def test_targets_that_peft_would_leave_out_are_refused(targets, said, tiny_base, make_run, tmp_path):
    """Beside others without a word; where nothing is left, when the processes have started."""
    run = make_run(tiny_base, tmp_path, "lora", lora={"target_modules": targets})
    with pytest.raises(UsageError, match=said):
        check_base_model(tiny_base, run.recipe)
    with pytest.raises(UsageError, match=said):
        make_plan(run, None)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", "q_prj"])
def test_embedding_and_head_are_refused_before_anything_is_loaded(target, tiny_base, make_run, tmp_path):
    """Also with --force, which leaves `plan` out: FSDP or TRL would end the run with a traceback."""
    run = make_run(tiny_base, tmp_path, "lora", lora={"target_modules": ["k_proj", target]})
    said = f"'{target}' is not a linear of a layer; (allowed: .*q_proj|did you mean 'q_proj')"
    for force in (True, False):
        with pytest.raises(UsageError, match=said):
            check_before_training(run, force=force)
    with pytest.raises(UsageError, match=said):
        make_plan(run, None)
