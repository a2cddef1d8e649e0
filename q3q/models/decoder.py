"""A whole decoder from a checkpoint: embedding, blocks, final norm, head.

Shapes: B windows, T tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from q3q.errors import NumericsError
from q3q.models.anatomy import block_class
from q3q.models.attention import CAUSAL, Attention
from q3q.models.checkpoint import Checkpoint, ModelFacts
from q3q.models.qwen3 import Qwen3Block, Rope, rms_norm

# Positions whose logits are held at one time: a [positions, 151936] float32 slab of 512 is 0.3 GB.
HEAD_CHUNK = 512
# Logits that exist at one time where only likelihoods are wanted: on a GPU, and on a CPU (4 MB).
HEAD_LOGITS, CACHED_LOGITS = 1 << 26, 1 << 20


@dataclass
class Decoder:
    """embedding_VH, head_VH (the same tensor where they are tied), norm_H, and the blocks in order."""

    facts: ModelFacts
    embedding_VH: Tensor
    norm_H: Tensor
    head_VH: Tensor
    blocks: list[Qwen3Block]

    @property
    def rope(self) -> Rope:
        return Rope(self.facts, self.embedding_VH.device)

    @property
    def device(self) -> torch.device:
        return self.embedding_VH.device

    def embed(self, ids_BT: Tensor) -> Tensor:
        return self.embedding_VH[ids_BT.to(self.device)]

    def hidden(self, ids_BT: Tensor, attentions: Sequence[Attention] = ()) -> Tensor:
        """Final hidden states [B, T, H], normed: what the head reads. attentions: one a block if not plainly causal."""
        x_BTH, rope = self.embed(ids_BT), self.rope
        for k, block in enumerate(self.blocks):
            x_BTH = block(x_BTH, rope, attentions[k] if attentions else CAUSAL)
        return rms_norm(x_BTH, self.norm_H, self.facts.rms_norm_eps)

    def logits(self, hidden_PH: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Float32 logits [up to HEAD_CHUNK, V] of each run of positions, so that no large slab ever exists."""
        for start in range(0, hidden_PH.shape[0], HEAD_CHUNK):
            chunk = slice(start, start + HEAD_CHUNK)
            yield chunk, linear(hidden_PH[chunk], self.head_VH).float()

    def log_likelihoods(
        self, hidden_PH: Tensor, targets_R: Tensor, positions_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Natural log-probability of each target, and whether it is the most likely token; both [R].

        positions_R: the row of hidden_PH that each target is read at; by default one target a row.
        Logits exist for one slab of the vocabulary at a time, small enough to stay in a CPU's cache.
        """
        device = hidden_PH.device
        targets_R = targets_R.to(device)
        positions_R = torch.arange(len(targets_R), device=device) if positions_R is None else positions_R.to(device)
        positions, vocabulary = hidden_PH.shape[0], self.head_VH.shape[0]
        logsum_P = hidden_PH.new_full((positions,), -torch.inf, dtype=torch.float32)
        highest_P = torch.full_like(logsum_P, -torch.inf)
        chosen_R = logsum_P.new_full((len(targets_R),), torch.nan)
        for start in range(0, positions, HEAD_CHUNK):
            rows = slice(start, min(positions, start + HEAD_CHUNK))
            asked_R = (positions_R >= rows.start) & (positions_R < rows.stop)
            width = max(1, (CACHED_LOGITS if device.type == "cpu" else HEAD_LOGITS) // (rows.stop - rows.start))
            for first in range(0, vocabulary, width):
                logits_CS = linear(hidden_PH[rows], self.head_VH[first : first + width]).float()
                here_R = (asked_R & (targets_R >= first) & (targets_R < first + width)).nonzero().squeeze(1)
                chosen_R[here_R] = logits_CS[positions_R[here_R] - start, targets_R[here_R] - first]
                high_C = logits_CS.amax(1)
                highest_P[rows] = torch.maximum(highest_P[rows], high_C)
                slab_C = high_C + logits_CS.sub_(high_C[:, None]).exp_().sum(1).log()
                logsum_P[rows] = torch.logaddexp(logsum_P[rows], slab_C)
        return chosen_R - logsum_P[positions_R], chosen_R == highest_P[positions_R]


def load_decoder(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> Decoder:
    """The whole model in memory, every weight in `dtype`.

    Raises:
        NumericsError: a weight is not finite, as stored or in `dtype`; it is named.
    """

    def place(tensor: Tensor, name: str) -> Tensor:
        placed = tensor.to(device=device, dtype=dtype)
        if not torch.isfinite(placed).all():
            raise NumericsError(f"{name.removesuffix('.weight')}: the checkpoint's weights are not finite in {dtype}")
        return placed

    facts = checkpoint.facts
    embedding = place(checkpoint.embedding(), "embedding")
    head = embedding if facts.tied else place(checkpoint.head(), "head")
    act_bits = facts.packing.act_bits if facts.packing else None
    blocks = []
    for k in range(facts.layers):
        weights = {name: place(tensor, f"blocks.{k}.{name}") for name, tensor in checkpoint.block(k).items()}
        blocks.append(block_class(facts, k)(facts, weights, act_bits))
    return Decoder(facts, embedding, place(checkpoint.final_norm(), "final norm"), head, blocks)
