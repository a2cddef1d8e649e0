"""A whole decoder from a checkpoint: embedding, blocks, final norm, head.

Shapes: B windows, T tokens, H hidden, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from q3q.models.anatomy import block_class
from q3q.models.checkpoint import Checkpoint, ModelFacts
from q3q.models.qwen3 import Qwen3Block, Rope, rms_norm

# Positions whose logits are held at one time: a [positions, 151936] float32 slab of 512 is 0.3 GB.
HEAD_CHUNK = 512


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

    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Final hidden states [B, T, H], normed: what the head reads."""
        x_BTH, rope = self.embed(ids_BT), self.rope
        for block in self.blocks:
            x_BTH = block(x_BTH, rope)
        return rms_norm(x_BTH, self.norm_H, self.facts.rms_norm_eps)

    def logits(self, hidden_PH: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Float32 logits [up to HEAD_CHUNK, V] of each run of positions, so that no large slab ever exists."""
        for start in range(0, hidden_PH.shape[0], HEAD_CHUNK):
            chunk = slice(start, start + HEAD_CHUNK)
            yield chunk, linear(hidden_PH[chunk], self.head_VH).float()

    def log_likelihoods(self, hidden_PH: Tensor, targets_P: Tensor) -> tuple[Tensor, Tensor]:
        """Natural log-probability of each position's target, and whether it is the most likely token; both [P]."""
        scores, greedy = [], []
        for chunk, logits_CV in self.logits(hidden_PH):
            target_C = targets_P[chunk].to(logits_CV.device)
            chosen_C = logits_CV.gather(1, target_C[:, None]).squeeze(1)
            scores.append(chosen_C - logits_CV.logsumexp(1))
            greedy.append(logits_CV.argmax(1) == target_C)
        return torch.cat(scores), torch.cat(greedy)


def load_decoder(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu") -> Decoder:
    """The whole model in memory, every weight in `dtype`."""

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(device=device, dtype=dtype)

    facts = checkpoint.facts
    embedding = place(checkpoint.embedding())
    head = embedding if facts.tied else place(checkpoint.head())
    blocks = [
        block_class(facts, k)(facts, {name: place(tensor) for name, tensor in checkpoint.block(k).items()})
        for k in range(facts.layers)
    ]
    return Decoder(facts, embedding, place(checkpoint.final_norm()), head, blocks)
