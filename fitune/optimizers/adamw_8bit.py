"""AdamW in 6 bytes a parameter: bf16 weights rounded stochastically, bf16 gradients, moments of 8 bits.

It computes in float32. A weight's change is often smaller than half the distance to the next bf16 number; rounded to
the nearest, it would be lost in every step. So it is rounded up or down by chance, and is right on average. The moments
are bitsandbytes' blockwise 8-bit numbers (arXiv 2110.02861), each block with a scale of its own.

Nothing depends on how a weight's rows are dealt to ranks: a block never spans two rows, whether a weight has blocks is
decided by its whole shape, and what is drawn for an element follows from the seed, the step, the weight and the
element's place in it. torchao's optimizer, which is much the same, draws and decides by each rank's part.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from fitune.model.elementwise import GOLDEN, WORD, mix
from fitune.model.host_ram import host_zeros
from fitune.model.sharding import first_element, local_part, shard_group
from fitune.optimizers.adamw_step import update_rows
from fitune.optimizers.gradient_norm import norm_over_ranks, scale_to
from fitune.optimizers.host_states import HostGradients, stream_rows
from fitune.optimizers.moment import Moment, Step

MOMENTS = ("exp_avg", "exp_avg_sq_root")
SCALES = "{}_scale"
"The key of a moment's scales."
BLOCKS = (256, 128, 64)
"Elements of a row that share a scale, by preference: those of the first that divides a row."


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with decoupled weight decay for weights in bfloat16, sharded by rows or whole.

    State of a weight, each rank its own rows: `exp_avg` and `exp_avg_sq_root`, uint8 like the weight, with float32
    `exp_avg_scale` and `exp_avg_sq_root_scale` [rows, blocks of a row]. Vectors, and rows that no block divides, have
    float32 moments and no scales. With `offload` states and gradients lie in host RAM, but for those without scales,
    which are small (`fitune.optimizers.host_states`). Gradients must be finite: ask `clip` before `step`.
    """

    def __init__(
        self, params, lr: float, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, seed: int = 0, offload=False
    ):
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        self.seed = seed
        self._gradient_scale = 1.0
        self._host: HostGradients | None = None
        offloaded = [parameter for _, parameter in self._parameters() if block_of(parameter)] if offload else []
        if offloaded:
            stay = [parameter for _, parameter in self._parameters() if not block_of(parameter)]
            self._host = HostGradients(offloaded, stay)

    def let_gradients_go(self) -> None:
        """With `offload`: those of the pass before leave the GPU, the last of which is the embedding's, 1 GiB of 8B.

        For a moment when they are in host RAM anyway: what computes next waits for them.
        """
        if self._host:
            self._host.release()

    @torch.no_grad()
    def clip(self, max_norm: float) -> torch.Tensor:
        """The gradients' norm over all ranks, float32; the next step scales them down to `max_norm` if it is larger.

        The squares are added up in float32. The gradients stay as they are: scaled in bf16 they would be rounded again.
        Call on all ranks.
        """
        if self._host:
            self._host.arrive()
        norms = [norm for _, parameter in self._parameters() if (norm := self._norm_of(parameter)) is not None]
        norm = norm_over_ranks(norms, next((shard_group(parameter) for _, parameter in self._parameters()), None))
        self._gradient_scale = float(scale_to(max_norm, norm))
        return norm

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Changes weights and moments in place."""
        if self._host:
            self._host.arrive()
        for place, (group, parameter) in enumerate(self._parameters()):
            in_host_ram = self._in_host_ram(parameter)
            if parameter.grad is None and not (in_host_ram and parameter in self._host.norms):
                continue
            state = self._state_of(parameter)
            state["step"] += 1
            moments = [Moment(state[key], state.get(SCALES.format(key))) for key in MOMENTS]
            step = self._step_of(group, state["step"], place, parameter)
            if in_host_ram:
                update = partial(_update_rows_from, step)
                stream_rows(self._host.ring, local_part(parameter), self._host.of[parameter], moments, update)
            else:
                update_rows(local_part(parameter), local_part(parameter.grad), *moments, step)
        if self._host:
            self._host.ring.finish()  # a checkpoint may read the states next
            self._host.forget()
        self._gradient_scale = 1.0

    def _norm_of(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """Of this rank's rows of a gradient, float32; None without one."""
        if self._in_host_ram(parameter):
            return self._host.norms.get(parameter)
        if parameter.grad is None or not local_part(parameter.grad).numel():
            return None
        return torch.linalg.vector_norm(local_part(parameter.grad), dtype=torch.float32)

    def _in_host_ram(self, parameter: torch.nn.Parameter) -> bool:
        return self._host is not None and parameter in self._host.of

    def _step_of(self, group: dict, steps: torch.Tensor, place: int, parameter: torch.Tensor) -> Step:
        number = int(steps)
        start = mix(mix((self.seed * GOLDEN + number) & WORD) ^ (number & WORD))
        beta1, beta2 = group["betas"]
        return Step(
            rate=group["lr"], beta1=beta1, beta2=beta2, eps=group["eps"], decay=group["weight_decay"], number=number,
            gradient_scale=self._gradient_scale, key=mix(start ^ (place * GOLDEN & WORD)),
            first_element=first_element(parameter),
        )  # fmt: skip

    def _parameters(self) -> Iterator[tuple[dict, torch.nn.Parameter]]:
        return ((group, parameter) for group in self.param_groups for parameter in group["params"])

    def _state_of(self, parameter: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        """Its state, zeros before its first step."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            mine = local_part(parameter)
            block = block_of(parameter)
            zeros = partial(host_zeros, beside=mine.device) if self._in_host_ram(parameter) else torch.zeros
            place = {} if self._in_host_ram(parameter) else {"device": mine.device}
            for key in MOMENTS:
                state[key] = zeros(mine.shape, dtype=torch.uint8 if block else torch.float32, **place)
                if block:
                    blocks = (len(mine), parameter.shape[1:].numel() // block)
                    state[SCALES.format(key)] = zeros(blocks, dtype=torch.float32, **place)
        return state

    def fill_state(self, parameter: torch.nn.Parameter, saved: dict[str, torch.Tensor]) -> None:
        """Puts this rank's rows of a saved state in place."""
        for key, value in self._state_of(parameter).items():
            value.copy_(saved[key])

    def load_state_dict(self, state_dict: dict) -> None:
        """torch's own would cast the moments to the weights' dtype."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group |= {key: value for key, value in saved.items() if key != "params"}
        for index, (_, parameter) in enumerate(self._parameters()):
            if index in state_dict["state"]:
                self.fill_state(parameter, state_dict["state"][index])


def _update_rows_from(step: Step, weight, gradient, mean: Moment, root: Moment, first: int) -> None:
    """`update_rows` of rows whose first element lies `first` behind the step's."""
    update_rows(weight, gradient, mean, root, replace(step, first_element=step.first_element + first))


def block_of(parameter: torch.Tensor) -> int | None:
    """How many elements of a weight's rows share a scale; None where its moments are float32."""
    columns = parameter.shape[1:].numel() if parameter.ndim > 1 else 0
    return next((block for block in BLOCKS if columns and columns % block == 0), None)
