"""A second opinion on planning/memory.py that shares no formula with it: one rank of a tier, run on fake tensors.

    python benchmarks/fake_memory.py OUTPUT.json RECIPE PROFILE [--layers N] [--compute fp8] [--keep-gathered]
                                     [--set profile.KEY=VALUE]

fitune's own model code and sharding run two real training steps at the model's true shape, on fake tensors (shapes
without data) and a process group that only pretends, while PyTorch's MemTracker counts every storage alive. GPU kernels
that this CPU lacks are replaced by functions that allocate and keep the same tensors (`_pretend_gpu_kernels`).
What it cannot see: memory outside torch's allocator, holes inside it, library workspaces.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import transformers.models.llama.modeling_llama as llama
from bitsandbytes.functional import QuantState
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.random_checkpoint import config
from fitune.config.model_shapes import find_shape
from fitune.config.run import with_resharding
from fitune.model import attention, elementwise, fp8, head_loss, products, trained_fp8
from fitune.model.activations import keep_activations
from fitune.model.copies import CopiesParamGroup
from fitune.model.dropout_keys import DROPOUT_KEYS
from fitune.model.e4m3 import E4M3
from fitune.model.fp8_linear import FP8Linear
from fitune.model.gradient_dtype import keep_gradients_as_computed
from fitune.model.lora_linears import LoraLinears
from fitune.model.nf4 import BLOCK, NESTED_BLOCK, NF4Linear
from fitune.model.one_rank import OneRankParamGroup
from fitune.model.sharding import new_mesh, shard, trained_dtype
from fitune.model.skeleton import build_skeleton, decoder
from fitune.optimizers import adamw_8bit
from fitune.planning.fill import resolve
from fitune.planning.plan import setup_of
from fitune.training.loss import ANSWERS, Answers, add_answer_loss

GIB = 2**30
HOOKS = ("pre_forward", "pre_backward", "post_backward")


class Tracker(MemTracker):
    """Total bytes alive, and the largest total of each phase."""

    def __init__(self):
        super().__init__()
        self.phase = "start"
        self.peaks: dict[str, int] = {}

    def _update_peak_stats(self, peak_state) -> None:
        now = self._curr_mem_snap.get(torch.device("cpu"), {}).get("Total", 0)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), now)

    def _pre_fw_hook(self, *_) -> None:
        """MemTracker's account by module is not wanted; it also fails on parameters without gradients."""

    _post_fw_hook = _pre_bw_hook = _post_bw_hook = _pre_fw_hook

    def track(self, tensors) -> None:
        for tensor in tensors:
            self._update_and_maybe_create_winfos(tensor, _MemRefType.PARAM)


def measure(
    recipe: str, profile: str, layers: int | None = None, *, compute: str = "bf16", reshard_after_forward: bool = True,
    sets: list[str] | None = None,
) -> dict:  # fmt: skip
    """Peaks of the second optimizer step of rank 0 in GiB, by phase."""
    run = resolve(recipe, profile, (f"profile.compute={compute}", "profile.replicas=1", *(sets or [])))
    run = with_resharding(run, reshard_after_forward)
    size = next(part for part in recipe.split("_") if part in ("1b", "8b", "70b"))
    layers = layers or config(size, None)["num_hidden_layers"]
    ranks = run.accelerate.num_processes
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    model = _sharded_skeleton(run, config(size, layers), new_mesh("cpu", run))
    tracker = Tracker()
    _follow_phases(tracker, layers)
    with FakeTensorMode(allow_non_fake_inputs=True):
        statistics = _allocate(model)
        if replace(setup_of(run, find_shape(run.recipe.base.model)), accumulation=1).uncast_gradients:
            keep_gradients_as_computed(model)
        optimizer = _optimizer(run, [parameter for parameter in model.parameters() if parameter.requires_grad])
        # the first step makes the optimizer's state; it is short since fake tensors keep its hidden states alive
        batches = [_batch(64), _batch(run.profile.micro_batch * run.recipe.max_length)]
        answers = batches[1][ANSWERS]
        tracker.track([*model.parameters(), *statistics, batches[1]["input_ids"], answers.places, answers.tokens])
        with tracker:
            for batch in batches:
                tracker.peaks.clear()
                _step(model, optimizer, batch, tracker)
    dist.destroy_process_group()
    peaks = {phase: round(size / GIB, 3) for phase, size in tracker.peaks.items() if phase != "start"}
    return {
        "recipe": recipe, "profile": profile, "compute": compute, "reshard_after_forward": reshard_after_forward,
        "sets": sets or [], "layers": layers, "ranks": ranks,
        "micro_batch": run.profile.micro_batch, "kept_layers": min(run.profile.kept_layers, layers),
        "reduce_dtype": run.profile.reduce_dtype,
        "tokens": run.profile.micro_batch * run.recipe.max_length, "peak_allocated_gib": max(peaks.values()),
        "phases": peaks, "torch": torch.__version__.split("+")[0],
    }  # fmt: skip


def _optimizer(run, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if run.profile.optimizer_state == "fp32":
        return torch.optim.AdamW(parameters, foreach=False, fused=True)
    adamw_8bit.update_rows = lambda *args: None  # a kernel that takes no memory
    adamw_8bit.AdamW8bit._step_of = lambda *args: None  # asks for a tensor's number
    return adamw_8bit.AdamW8bit(parameters, lr=1e-5)


def _sharded_skeleton(run, model_config: dict, mesh) -> nn.Module:
    _pretend_gpu_kernels()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(model_config), encoding="utf-8")
        tokenizer = SimpleNamespace(pad_token_id=0, get_vocab=dict, convert_tokens_to_ids=list)
        in_fp8 = run.profile.compute == "fp8"
        model = build_skeleton(
            run.recipe, Path(folder), tokenizer, torch.bfloat16, "cpu", trained_dtype(run), fp8=in_fp8
        )
    add_answer_loss(decoder(model))
    keep_activations(model, run.profile.kept_layers, attention=run.profile.keeps_attention)
    shard(model, mesh, run, torch.bfloat16, keep_gathered=run.accelerate.keeps_gathered)
    return model.train()


def _allocate(model: nn.Module) -> list[torch.Tensor]:
    """Fake memory for the weights, as `fitune.weights.load` takes real memory; returns the scales of packed ones."""
    model.to_empty(device="cpu")
    backbone = decoder(model).model
    backbone.rotary_emb = type(backbone.rotary_emb)(config=backbone.config)
    found = []
    for module in model.modules():
        if isinstance(module, NF4Linear):
            blocks = module.in_features * module.out_features // BLOCK
            nested = QuantState(absmax=torch.empty(-(-blocks // NESTED_BLOCK)), code=torch.empty(256),
                                blocksize=NESTED_BLOCK, dtype=torch.float32)  # fmt: skip
            module.quant_state = QuantState(
                absmax=torch.empty(blocks, dtype=torch.uint8), code=torch.empty(16), blocksize=BLOCK, quant_type="nf4",
                shape=torch.Size((module.out_features, module.in_features)), dtype=torch.bfloat16,
                offset=torch.empty(()), state2=nested,
            )  # fmt: skip
            found += [module.quant_state.absmax, nested.absmax]
        elif isinstance(module, FP8Linear):
            module.scales = torch.empty(module.out_features)
            found.append(module.scales)
    return found


def _batch(tokens: int) -> dict[str, torch.Tensor]:
    """One packed row, every token an answer."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    positions = torch.arange(tokens).unsqueeze(0) % (tokens // 2)
    bounds = torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)
    packing = {"position_ids": positions, "cu_seq_lens_q": bounds, "max_length_q": tokens // 2}
    packing[DROPOUT_KEYS] = torch.zeros(tokens, dtype=torch.int32)
    return {"input_ids": ids, ANSWERS: Answers(torch.arange(tokens), torch.zeros(tokens, dtype=torch.long)), **packing}


def _step(model: nn.Module, optimizer, batch: dict, tracker: Tracker) -> None:
    tracker.phase = "forward"
    loss = model(**batch, use_cache=False).loss
    tracker.phase = "backward, loss"
    loss.backward()
    tracker.phase = "optimizer step"
    optimizer.step()
    optimizer.zero_grad()
    tracker.phase = "start"


def _follow_phases(tracker: Tracker, layers: int) -> None:
    """Names phases as fitune.planning.memory does, by the parameter group whose hook runs."""
    after = {
        ("pre_forward", "head"): "forward, loss",
        ("pre_backward", str(layers - 2)): "backward, between",
        ("pre_backward", "1"): "backward, second layer",
        ("pre_backward", "0"): "backward, first layer",
        ("post_backward", "0"): "backward, embedding",
        ("pre_backward", str(layers - 1)): "backward, last layer",
    }

    def followed(kind: type[FSDPParamGroup], name: str):
        original = getattr(kind, name)

        def hook(group, *args, **kwargs):
            unit = "head" if "lm_head" in group._module_fqn else group._module_fqn.rsplit(".", 1)[-1]
            if (name, unit) == ("pre_forward", "head"):
                tracker.phase = "forward, gathering the head"
            result = original(group, *args, **kwargs)
            tracker.phase = after.get((name, unit), tracker.phase)
            return result

        return hook

    for name in HOOKS:
        for kind in (FSDPParamGroup, CopiesParamGroup, OneRankParamGroup):
            if name in vars(kind):
                setattr(kind, name, followed(kind, name))


class _RmsNorm(torch.autograd.Function):
    """Liger's: keeps its input and one number per token; the gradient overwrites the incoming one."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, torch.empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, gradient):
        weight = ctx.saved_tensors[1]
        return gradient.contiguous(), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


def _pretend_gpu_kernels() -> None:
    """Those of layers, Liger's norm, the loss's kernel and products."""
    _pretend_layer_kernels()
    llama.LlamaRMSNorm.forward = lambda self, x: _RmsNorm.apply(x, self.weight)
    head_loss.fold = lambda logits, *rest: torch.empty(len(logits), 3)
    products.add = lambda sums, a, b: None


def _pretend_layer_kernels() -> None:
    """Those of fitune.model.layer_pass: each takes what it returns and nothing more."""

    def like(x, dropout):
        first = torch.empty_like(x)
        return first, torch.empty_like(x) if dropout else first

    elementwise.drop = lambda x, dropout: torch.empty_like(x) if dropout else x
    elementwise.rms_norm = lambda x, weight, eps, dropout: like(x, dropout)
    elementwise.dropped_norm = lambda x, *rest: torch.empty_like(x)
    elementwise.rms_norm_backward = lambda gradient, x, *rest, out=None: torch.empty_like(x) if out is None else out
    elementwise.trained_rms_norm_backward = lambda gradient, x, *rest: (
        elementwise.rms_norm_backward(gradient, x, out=rest[3]),
        torch.empty(x.shape[1]),
    )
    LoraLinears._put_down = lambda self, dx, *rest, **options: None
    elementwise.swiglu = lambda gate_up, dropout: like(gate_up[:, : gate_up.shape[1] // 2].contiguous(), dropout)
    elementwise.swiglu_backward_ = lambda gradient, *rest: torch.empty_like(gradient)
    elementwise.rope_ = lambda *args, **kwargs: None
    elementwise.rope_from_places = lambda parts, *rest, **options: torch.cat(list(parts), dim=1)
    attention.forward = lambda heads, key_heads, *rest: (
        torch.empty_like(heads[:, : -2 * key_heads], memory_format=torch.contiguous_format),
        (torch.empty(heads.shape[0], heads.shape[1] - 2 * key_heads),),
    )
    attention.backward = lambda gradient, output, heads, key_heads, *rest: (
        [
            torch.empty(len(heads), count, heads.shape[2], dtype=heads.dtype)
            for count in (output.shape[1], key_heads, key_heads)
        ],
        None,
    )
    for module in (fp8, trained_fp8):
        module.quantise_rows = lambda x, *rest, out=None: out or (torch.empty(x.shape, dtype=E4M3), torch.empty(len(x)))
        module.product = lambda values, scales, weights, weight_scales, out, *rest, **options: out
        module.round_matrix = lambda matrix, scales, out: None
    trained_fp8.quantise_columns = lambda x, *rest: (torch.empty(x.T.shape, dtype=E4M3), torch.empty(x.shape[1]))
    trained_fp8.round_columns = lambda x, *rest: torch.empty(x.T.shape, dtype=E4M3)
    fp8._put_values = lambda base, scales, out: None
    products.weight = _weight


def _weight(base: nn.Linear, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """What packed weights take to be multiplied; the others are taken as they lie."""
    if not isinstance(base, NF4Linear):
        return base.weight
    return out if out is not None else torch.empty(base.out_features, base.in_features, dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("recipe")
    parser.add_argument("profile")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to be quick")
    parser.add_argument("--compute", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--keep-gathered", action="store_true", help="reshard_after_forward false")
    parser.add_argument("--set", action="append", default=[], dest="sets", help="profile.KEY=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    asked = {
        "recipe": options.recipe, "profile": options.profile, "compute": options.compute,
        "reshard_after_forward": not options.keep_gathered, "sets": options.sets,
    }  # fmt: skip
    result = measure(**asked, layers=options.layers)
    kept = json.loads(options.output.read_text(encoding="utf-8")) if options.output.exists() else []
    kept = [entry for entry in kept if not asked.items() <= entry.items()]
    options.output.write_text(json.dumps([*kept, result], indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
