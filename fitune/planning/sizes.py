"""The numbers of a run that decide how much memory it needs, and the bytes of each thing it holds.

h = hidden size, i = intermediate size, T = tokens of one forward pass (micro batch x max_length)
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property

from fitune.config.model_shapes import ModelShape
from fitune.config.optimizer_pieces import IN_FLIGHT_BYTES
from fitune.config.tiles import INPUT_AHEAD_BYTES, LOSS_TOKENS, LOSS_TOKENS_OF_A_TRAINED_HEAD

GIB = 2**30
FP8, BF16, FP32 = 1, 2, 4  # bytes
NF4 = 0.5  # bytes per weight, packed
NF4_STATISTICS = 1 / 64 + FP32 / (64 * 256)  # an 8-bit scale per 64 weights, a float32 one per 256 of those
ADAM_STATE = 2 * FP32  # exp_avg and exp_avg_sq
EIGHT_BIT_STATE = 2 * (1 + FP32 / 256)  # the same as codes, with a float32 scale per 256 of them


@dataclass(frozen=True)
class Setup:
    """The numbers that decide how much memory a run needs. `fitune.planning.plan` fills it from a resolved run."""

    shape: ModelShape
    method: str
    ranks: int
    machines: int
    "Over which the ranks are spread evenly."
    micro_batch: int
    max_length: int
    accumulation: int
    "Micro batches per optimizer step."
    compute: int = BF16
    "Bytes of one activation: bf16 on GPUs, float32 on CPUs."
    optimizer_state: float = ADAM_STATE
    "Bytes per trained parameter."
    small_states: bool = False
    "Method full's weights and gradients are kept in bf16."
    optimizer_offload: bool = False
    "Gradients and optimizer state live in host RAM, weights on the GPU."
    lora_r: int = 0
    lora_targets: frozenset[str] = frozenset()
    lora_dropout: bool = False
    trained_tokens: int = 0
    offload: bool = False
    "Sharded weights, gradients and optimizer state live in host RAM."
    streams_adamw: bool = False
    "The GPU computes the step of what is offloaded, piece by piece."
    embedding_offload: bool = False
    kept_layers: int = 0
    "Layers that keep their activations; the others compute them again."
    kept_attention: bool = False
    "The others keep attention's result beside their input."
    activation_offload: bool = False
    "What the others keep waits in host RAM."
    fp8: bool = False
    "The decoder layers' linears are multiplied in fp8; method lora keeps them so."
    reshard: bool = True
    on_gpu: bool = True
    replicas: int = 1
    "Copies of the model, each over as many ranks."
    adapters_wait: bool = False
    "Each rank adds up its own gradients of the adapters, whole, until a step's last micro batch."
    saves: bool = True
    "Writes checkpoints on the way."
    async_save: bool = False
    "Copies each to host RAM first and trains on."
    takes_bf16_gradients: bool = False
    "The optimizer's step takes them for float32 weights."
    reduce_in_bf16: bool = False
    "What method full's gradients are added up in between the ranks of a copy, if it is the only one."

    @cached_property
    def tokens(self) -> int:
        return self.micro_batch * self.max_length

    def of_rows(self, rows: int, batch: int) -> "Setup":
        """The same with so many rows a pass, in as many passes as a batch then takes."""
        return replace(self, micro_batch=rows, accumulation=math.ceil(batch / (rows * self.ranks)))

    @property
    def full(self) -> bool:
        return self.method == "full"

    @property
    def shards(self) -> int:
        """Ranks that hold one copy of the model between them."""
        return self.ranks // self.replicas

    @property
    def copies_a_machine(self) -> float:
        """Copies of the model on one machine: a part of one where several machines share it."""
        return self.replicas / self.machines

    @property
    def part_of_a_copy(self) -> float:
        """How much of one copy lies on one machine: all of it, but where several machines share it."""
        return min(1.0, self.copies_a_machine)

    @property
    def embedding_in_ram(self) -> bool:
        """Whether embedding and head wait in host RAM, alone or with all else."""
        return self.offload or self.embedding_offload

    @property
    def holds_a_whole_copy(self) -> bool:
        """Whether each of several ranks has a whole frozen base on its GPU, and gradients travel without FSDP."""
        return self.shards == 1 and self.replicas > 1 and not (self.full or self.embedding_in_ram)

    # Weights

    @property
    def trained(self) -> int:
        """Bytes of one trained weight as stored: float32 but for small states."""
        return BF16 if self.small_states else FP32

    @property
    def uncast_gradients(self) -> bool:
        """Whether method full's gradients stay as they were computed or added up: no other pass adds to them."""
        stay = not (self.offload or self.optimizer_offload) and self.replicas == 1
        arrive_so = self.shards == 1 or self.reduce == self.compute
        return self.takes_bf16_gradients and self.cast and self.accumulation == 1 and stay and arrive_so

    @property
    def gradients_in_place(self) -> bool:
        """Whether what one rank computes is what its optimizer reads."""
        return self.uncast_gradients and not self.reduced

    @property
    def gradient(self) -> int:
        """Bytes of one as it is kept for the optimizer."""
        return self.compute if self.uncast_gradients else self.trained

    @property
    def weight(self) -> float:
        """Bytes of one decoder-layer weight as stored: trained ones, packed NF4, fp8, or as it computes."""
        return {"full": self.trained, "qlora": NF4, "lora": FP8 if self.fp8 else self.compute}[self.method]

    @cached_property
    def lora_per_layer(self) -> int:
        """Parameters of A [r, in] and B [out, r] of every targeted linear."""
        return sum(self.lora_r * sum(self.shape.linears[name]) for name in self.lora_targets)

    @cached_property
    def trainable(self) -> int:
        """Parameters."""
        if self.full:
            return self.shape.parameters
        return self.shape.layers * self.lora_per_layer + 2 * self.trained_tokens * self.shape.hidden

    @cached_property
    def layer_weights(self) -> float:
        """Base weights of one layer as stored; norms and biases are never quantised."""
        norm = self.trained if self.full else self.compute
        return self.shape.layer_linear_weights * self.weight + self.shape.layer_vector_weights * norm

    @property
    def embedding(self) -> float:
        """Embedding or head as stored; neither is ever quantised."""
        return self.shape.embedding_weights * (self.trained if self.full else self.compute)

    @property
    def one_embedding(self) -> bool:
        """Whether embedding and head are one tensor in memory, which the whole model's unit keeps gathered."""
        return self.full and self.shape.tied

    @property
    def embeddings(self) -> float:
        """Embedding and head as stored."""
        return self.embedding * (1 if self.one_embedding else 2)

    @cached_property
    def statistics(self) -> float:
        """NF4's scales and fp8's, whole on every rank and on the GPU even when the weights are offloaded."""
        linears = self.shape.layers * self.shape.layer_linear_weights
        scales = sum(rows for rows, _ in self.shape.linears.values()) * FP32 * self.fp8 * (not self.full)
        return linears * NF4_STATISTICS * (self.method == "qlora") + self.shape.layers * scales

    @cached_property
    def gathered_layer(self) -> float:
        """One layer as it computes, all ranks' rows; LoRA is gathered in float32."""
        if self.full:
            return (self.shape.layer_linear_weights + self.shape.layer_vector_weights) * self.compute
        return self.layer_weights + self.lora_per_layer * FP32

    @property
    def gathered_head(self) -> float:
        return self.shape.embedding_weights * self.compute

    @cached_property
    def unsharded_layer(self) -> float:
        """What a gathered layer takes beside this rank's share. One rank uses what lies on the GPU where it is."""
        return 0.0 if self._in_place and not self.offload else self.gathered_layer

    @property
    def unsharded_head(self) -> float:
        return 0.0 if self._in_place and not self.embedding_in_ram else self.gathered_head

    @property
    def looks_up_in_host_ram(self) -> bool:
        """Whether the embedding stays there whole, and only rows of a pass's tokens travel: they are a hidden state."""
        return self.shards == 1 and not self.full and self.embedding_in_ram

    @property
    def head_copy(self) -> float:
        """The head with its trained rows in place, for the loss."""
        return self.gathered_head if self.trained_tokens else 0.0

    @property
    def _in_place(self) -> bool:
        """Whether a weight that lies on the GPU is one to compute with: whole, and not in need of a cast."""
        return self.shards == 1 and not self.cast

    @property
    def cast(self) -> bool:
        """Whether weights are computed with in another dtype than they are kept in."""
        return self.full and self.compute != self.trained

    @property
    def reduced(self) -> bool:
        """Whether FSDP takes a layer's gradients from where they were computed to where they are kept."""
        return self.full and (self.shards > 1 or self.offload or self.replicas > 1)

    @property
    def reduce(self) -> int:
        """Bytes of a gradient on that way."""
        in_bf16 = self.reduce_in_bf16 and self.full and self.compute == BF16 and self.replicas == 1
        return BF16 if in_bf16 else FP32

    @property
    def sums_apart(self) -> bool:
        """Whether what ranks have added up goes elsewhere: to another dtype, or to host RAM."""
        return self.reduced and (self.reduce != self.gradient or self.offload or self.optimizer_offload)

    @property
    def held_sums(self) -> int:
        """Bytes of each gradient of the last unit, which copies are still adding up while the next one computes."""
        return self.reduce * (self.sums_apart and self.replicas > 1)

    @property
    def stay_gathered(self) -> bool:
        """Whether gathered layers stay to the end of a step of several passes: method full's change only then."""
        return self.full and not self.reshard and self.accumulation > 1

    @property
    def gathers(self) -> float:
        """How often each pass gathers a layer, or casts it."""
        return 2.0 if self.reshard else 1 / self.accumulation if self.stay_gathered else 1.0

    @property
    def gradients(self) -> float:
        """This rank's, bytes."""
        return self.trainable / self.shards * self.gradient

    @property
    def waiting_gradients(self) -> float:
        """The same between micro batches: in float32 until replicas add theirs up, and whole until all ranks do."""
        if self.adapters_wait:
            return self.trainable * FP32
        return self.trainable / self.shards * FP32 if self.reduced_once else self.gradients

    @property
    def reduced_once(self) -> bool:
        """Whether replicas add up their gradients once a step, not each micro batch: those on the GPU wait there."""
        return self.replicas > 1 and not (self.full and (self.offload or self.optimizer_offload))

    @property
    def new_head_gradient(self) -> float:
        """Bytes of the head's, as method full keeps it, where it stays and no earlier pass has made room for it."""
        stays = self.full and not (self.accumulated_on_gpu or self.offload or self.optimizer_offload)
        return self.shape.embedding_weights / self.shards * self.gradient * stays

    @property
    def last_gradients(self) -> float:
        """Those of the embedding and the first two layers, which a backward pass comes to last: this rank's, bytes."""
        if self.full:
            layer, embedding = (
                self.shape.layer_linear_weights + self.shape.layer_vector_weights,
                self.shape.embedding_weights,
            )
        else:
            layer, embedding = self.lora_per_layer, self.trained_tokens * self.shape.hidden
        return (min(2, self.shape.layers) * layer + embedding) / self.shards * self.gradient

    @property
    def accumulated_on_gpu(self) -> bool:
        """Whether gradients wait there for the next micro batch: an adapter's of one rank or a replica always do."""
        on_gpu = not self.offload or (not self.full and (self.ranks == 1 or self.replicas > 1 or self.adapters_wait))
        return self.accumulation > 1 and on_gpu and not self.optimizer_offload

    @property
    def leaving_gradients(self) -> float:
        """Those of layers that wait to leave the GPU for host RAM, at most: this rank's, bytes."""
        if not self.optimizer_offload:
            return 0.0
        layer = self.shape.layer_linear_weights * self.trained / self.shards
        return min(self.gradients, IN_FLIGHT_BYTES + layer)

    @property
    def leaving_head_gradient(self) -> float:
        return self.shape.embedding_weights * self.trained / self.shards * self.optimizer_offload

    # Activations, bytes

    @cached_property
    def hidden_state(self) -> float:
        """[T, h]."""
        return self.tokens * self.shape.hidden * self.compute

    @property
    def inner_state(self) -> float:
        """[T, i]."""
        return self.tokens * self.shape.intermediate * self.compute

    @property
    def query_heads(self) -> float:
        """Queries, or what attention makes of them [T, heads x head_dim]."""
        return self.tokens * self.shape.heads * self.shape.head_dim * self.compute

    @property
    def shared_heads(self) -> float:
        """Keys, or values [T, kv_heads x head_dim]."""
        return self.tokens * self.shape.kv_heads * self.shape.head_dim * self.compute

    @property
    def recomputed_layers(self) -> int:
        return self.shape.layers - self.kept_layers

    @cached_property
    def saved_by_layer(self) -> float:
        """What one layer keeps for its backward pass, its input left out.

        `fitune.model.layer`: q, k, v; attention's output; the MLP's input; gate and up; LoRA's x A'.
        """
        lows = self.tokens * self.lora_r * len(self.lora_targets) * self.compute
        attention = 2 * self.query_heads + 2 * self.shared_heads + self.softmax_sums
        return attention + self.hidden_state + 2 * self.inner_state + lows

    @property
    def softmax_sums(self) -> float:
        """Of each head and token, in float32."""
        return self.tokens * self.shape.heads * FP32

    @property
    def attention_result(self) -> float:
        """What one layer's attention returns: the heads' output, and what its backward pass needs beside it."""
        return self.query_heads + self.softmax_sums

    @property
    def kept_activations(self) -> float:
        """Alive from forward to backward: each layer's input, and all that kept layers save."""
        by_a_kept_one = self.hidden_state + self.saved_by_layer
        by_the_others = self.recomputed_layers * self.kept_by_recomputed_layer * (not self.activation_offload)
        return self.kept_layers * by_a_kept_one + by_the_others

    @property
    def kept_by_recomputed_layer(self) -> float:
        return self.hidden_state + self.attention_result * self.kept_attention

    @property
    def inputs_in_host_ram(self) -> float:
        """What one rank's recomputed layers keep there, from forward to backward."""
        return self.recomputed_layers * self.kept_by_recomputed_layer * self.activation_offload

    @property
    def inputs_back(self) -> float:
        """Of that, on the GPU in the backward pass: what the layer that computes has kept, and the next one."""
        ahead = self.kept_by_recomputed_layer <= INPUT_AHEAD_BYTES
        return min(self.recomputed_layers, 1 + ahead) * self.kept_by_recomputed_layer * self.activation_offload

    @property
    def loss_tile(self) -> float:
        """Logits of the tokens whose loss is computed at once."""
        tokens = LOSS_TOKENS_OF_A_TRAINED_HEAD if self.trained_head else LOSS_TOKENS
        return min(self.tokens, tokens) * self.shape.vocabulary * self.compute

    @property
    def trained_head(self) -> bool:
        """Whether the loss computes a gradient of the whole head: an adapter's trained tokens are rows of a copy."""
        return self.full or bool(self.trained_tokens)
