"""A toy family in one file: two of three blocks carry a decaying sum in place of attention.

It loads without torch, as a plan reads it. `Decaying` is dense, `DecayingMoe` has experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from q3q.models.anatomy import ScaleGroup, Site
from q3q.models.families.qwen3_moe import Qwen3Moe
from q3q.models.family import Family

if TYPE_CHECKING:
    from torch import Tensor

MIX = Site("mix", ("mix.in_proj.weight",), mixes_tokens=True)
OUT = Site("o", ("mix.out_proj.weight",))
CHANNELS, WIDTH = 20, 3


@dataclass(frozen=True)
class DecayingSum:
    """A short causal convolution, then h <- a h + x; the output is h.

    decay_X: a's logit. convolution_XW: the newest token's weight comes last.
    """

    decay_X: Tensor
    convolution_XW: Tensor

    def __call__(
        self, inputs_BTX: Tensor, state: Any = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        import torch

        rows, tokens, channels = inputs_BTX.shape
        if state is None:
            zeros = inputs_BTX.new_zeros(rows, WIDTH - 1, channels)
            state = zeros, inputs_BTX.new_zeros(rows, channels, dtype=torch.float32)
        last_BWX, sum_BX = state
        if lengths_B is None:
            lengths_B = torch.full((rows,), tokens)
        joined_BTX = torch.cat((last_BWX, inputs_BTX), dim=1)
        decay_X, outputs = self.decay_X.sigmoid().float(), []
        for t in range(tokens):
            mixed_BX = (joined_BTX[:, t : t + WIDTH] * self.convolution_XW.T).sum(1).float()
            new_BX = decay_X * sum_BX + mixed_BX
            sum_BX = torch.where((t < lengths_B)[:, None], new_BX, sum_BX)
            outputs.append(new_BX)
        place_BW = lengths_B[:, None] + torch.arange(WIDTH - 1)
        last_BWX = joined_BTX[torch.arange(rows)[:, None], place_BW]
        return torch.stack(outputs, dim=1).to(inputs_BTX.dtype), (last_BWX, sum_BX)


class Decaying(Family):
    name = "Decaying"
    model_types = ("decaying",)
    kept: ClassVar[dict[str, str]] = {
        **Family.kept,
        "mix.decay": "few numbers, of the recurrence",
        "mix.convolution.weight": "few numbers, of the recurrence",
    }

    def attends(self, layer):
        return layer % 3 == 1

    def shapes(self, facts, layer):
        shapes = super().shapes(facts, layer)
        if self.attends(layer):
            return shapes
        return {n: shape for n, shape in shapes.items() if not n.startswith("self_attn.")} | {
            "mix.in_proj.weight": (CHANNELS, facts.hidden),
            "mix.decay": (CHANNELS,),
            "mix.convolution.weight": (CHANNELS, WIDTH),
            "mix.out_proj.weight": (facts.hidden, CHANNELS),
        }

    def sites(self, facts, layer):
        sites = super().sites(facts, layer)
        return sites if self.attends(layer) else (MIX, OUT, *sites[2:])

    def scale_groups(self, facts, layer):
        groups = super().scale_groups(facts, layer)
        if self.attends(layer):
            return groups
        return ScaleGroup(MIX, "input_layernorm.weight"), *groups[2:]

    def attention_stages(self, block, normed_BTH, rope, attention):
        if self.attends(block.layer):
            return (yield from super().attention_stages(block, normed_BTH, rope, attention))
        yield MIX, block.halt(normed_BTH)
        inputs_BTX = block.linear(*MIX.weights, block.round_inputs(MIX, normed_BTH))
        decaying = DecayingSum(block.weights["mix.decay"], block.weights["mix.convolution.weight"])
        mixed_BTX = attention.read(attention.recur(decaying, inputs_BTX))
        del normed_BTH, inputs_BTX
        yield OUT, block.halt(mixed_BTX)
        return block.linear(*OUT.weights, block.round_inputs(OUT, mixed_BTX))

    def state_width(self, facts, layer):
        return super().state_width(facts, layer) if self.attends(layer) else 0

    def recurrent_width(self, facts, layer):
        return 0 if self.attends(layer) else WIDTH * CHANNELS


class DecayingMoe(Decaying, Qwen3Moe):
    name = "Decaying-MoE"
    model_types = ("decaying_moe",)
    kept: ClassVar[dict[str, str]] = {**Decaying.kept, **Qwen3Moe.kept}


MODEL: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=48,
    num_hidden_layers=3,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    torch_dtype="float32",
)
EXPERTS: dict[str, Any] = dict(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
)


def save_random(folder, model_type="decaying", **changed):
    """Save a random model; the families must be registered."""
    import torch
    from safetensors.torch import save_file

    from q3q.models.disk_names import of_expert
    from q3q.models.facts import read_facts

    more = EXPERTS if model_type == "decaying_moe" else {}
    config = {"model_type": model_type, **MODEL, **more, **changed}
    facts, random = read_facts(config), torch.Generator().manual_seed(0)

    def tensor(name, shape):
        if name.endswith("norm.weight"):
            return 1 + 0.3 * torch.randn(shape, generator=random)
        return torch.randn(shape, generator=random) / shape[-1] ** 0.5

    tensors = {
        facts.family.embedding: torch.randn(facts.vocab, facts.hidden, generator=random),
        facts.family.final_norm: torch.ones(facts.hidden),
    }
    for k in range(facts.layers):
        for name, shape in facts.block_shapes(k).items():
            whole = tensor(name, shape)
            if len(shape) < 3:
                tensors[facts.on_disk(k, name)] = whole
            else:
                parts = {of_expert(name, e): part for e, part in enumerate(whole)}
                tensors |= {facts.on_disk(k, part): x.clone() for part, x in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
