"""The model's skeleton on the meta device: architecture, quantised linears, adapter, kernels. Reads no weight."""

import logging
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from fitune.config.base_model import check_base_model
from fitune.config.recipe import Lora, Recipe
from fitune.config.shipped import how_to_install
from fitune.errors import UsageError
from fitune.model.attention import PACKED_ATTENTION
from fitune.model.fp8_linear import FP8Linear
from fitune.model.layer import use_fp8_products, use_written_out_layers
from fitune.model.nf4 import NF4Linear


def build_skeleton(
    recipe: Recipe,
    base_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    compute_dtype: torch.dtype,
    device_type: str,
    trained_dtype: torch.dtype = torch.float32,
    *,
    adapter: bool = True,
    fp8: bool = False,
) -> nn.Module:
    """What `recipe.method` trains, all parameters on meta: a LlamaForCausalLM or its like, or a PeftModel around it.

    Without `adapter` the frozen model alone, to be asked. With `fp8` its layers train with fp8 products.

    Frozen weights have `compute_dtype` (or are packed NF4, or e4m3 with `fp8`), an adapter float32: its optimizer needs
    the precision; layers cast it for the computation. Method full's have `trained_dtype`, which FSDP casts.
    A frozen head has a parameter of its own, even where it is the embedding; method full trains both as the one tensor
    that they are.
    Raises UsageError for a base that the recipe cannot be trained on, or whose sizes forbid fp8.
    """
    check_base_model(base_folder, recipe)
    config = AutoConfig.from_pretrained(base_folder, trust_remote_code=False)
    if recipe.method != "full":
        config.tie_word_embeddings = False  # `fitune.weights.load` reads the head from the embedding
    stored_dtype = config.dtype or torch.bfloat16
    config.pad_token_id = None  # else the embedding never learns that token, which may also end a turn
    with torch.device("meta"):
        dtype = trained_dtype if recipe.method == "full" else compute_dtype
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=PACKED_ATTENTION, trust_remote_code=False
        )
    model.config.dtype = stored_dtype  # what a fully trained model is saved in
    model.generation_config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
    if device_type == "cuda":
        _use_liger_kernels(model)
    if recipe.method == "qlora":
        _replace_linears(model, NF4Linear)
    elif recipe.method == "lora" and fp8:
        _replace_linears(model, FP8Linear)
    use_written_out_layers(model, train_base=recipe.method == "full")
    if fp8:
        use_fp8_products(model)
    if recipe.method == "full":
        return model
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if not adapter:
        return model
    return _add_lora(model, recipe.lora, tokenizer)


def decoder(model: nn.Module) -> PreTrainedModel:
    """The LlamaForCausalLM, or its like, inside `model`, adapter or not."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_tied(causal_lm: nn.Module) -> bool:
    """Whether embedding and head are one parameter: never where the base is frozen."""
    return bool(causal_lm.config.tie_word_embeddings)


def _use_liger_kernels(model: PreTrainedModel) -> None:
    """Fused RMSNorm, SwiGLU and RoPE, for what the written-out layer does not compute, such as answers."""
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it warns of each accelerator that is not here
    try:
        from liger_kernel import transformers as liger
    except ImportError:
        raise UsageError(f"liger-kernel is not installed; run: {how_to_install('liger-kernel')}") from None
    apply_to_architecture = getattr(liger, f"apply_liger_kernel_to_{model.config.model_type}")
    apply_to_architecture(
        rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model
    )


def _replace_linears(model: PreTrainedModel, kind: type[NF4Linear] | type[FP8Linear]) -> None:
    """`kind` for every linear of the decoder layers; embedding, norms and head keep full precision (QLoRA, 2305.14314).

    Rows of NF4 are whole blocks, or `check_base_model` has refused them: on CPUs with AVX-512, bitsandbytes 0.50.2
    multiplies as if every row began one.
    """
    for layer in model.model.layers:
        for name, module in list(layer.named_modules()):
            if isinstance(module, nn.Linear):
                parent, _, child = name.rpartition(".")
                options = {"bias": module.bias is not None, "dtype": module.weight.dtype, "device": "meta"}
                setattr(layer.get_submodule(parent), child, kind(module.in_features, module.out_features, **options))


def _add_lora(model: PreTrainedModel, lora: Lora, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    token_ids = _token_ids(lora.trainable_tokens, tokenizer)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        trainable_token_indices={"embed_tokens": token_ids, "lm_head": token_ids} if token_ids else None,
        task_type="CAUSAL_LM",
    )
    try:
        model = get_peft_model(model, config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise UsageError(f"lora.target_modules {lora.target_modules}: {error}") from None
    for module in model.modules():
        if isinstance(module, LoraLayer):
            _cast_lora_while_computing(module)
        elif isinstance(module, TrainableTokensLayer):
            module.__class__ = _TrainableTokens
        elif isinstance(module, TrainableTokensWrapper):
            module.bias = None  # the loss asks the head for it
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _token_ids(tokens: list[str], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    unknown = [token for token in tokens if token not in tokenizer.get_vocab()]
    if unknown:
        raise UsageError(f"lora.trainable_tokens: '{unknown[0]}' is not a token of the model's tokenizer")
    return tokenizer.convert_tokens_to_ids(tokens)


class _LoraLinear(nn.Linear):
    """float32 master weights, cast to the activations' dtype for the product (PEFT would cast the activations up)."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


def _cast_lora_while_computing(module: LoraLayer) -> None:
    module.cast_input_dtype_enabled = False
    for part in (*module.lora_A.values(), *module.lora_B.values()):
        part.__class__ = _LoraLinear


class _TrainableTokens(TrainableTokensLayer):
    """PEFT's layer without its copy of the whole embedding or head per forward (2 GiB at 70B).

    Only the looked-up rows, or the logits, of trained tokens are replaced. The loss asks for the head's weight,
    though, and gets a copy.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output = self.base_layer(x)
        if self.disable_adapters or not self.active_adapters:
            return output
        [adapter] = self.active_adapters
        rows, token_ids = self.trainable_tokens_delta[adapter].to(output.dtype), self.token_indices[adapter]
        if isinstance(self.base_layer, nn.Linear):
            return output.index_copy(-1, torch.tensor(token_ids, device=output.device), F.linear(x, rows))
        for row, token_id in zip(rows, token_ids, strict=True):
            output = torch.where((x == token_id).unsqueeze(-1), row, output)
        return output
