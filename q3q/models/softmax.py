"""Attention of queries to keys by softmax: kernels that give its denominator too, and plain twins.

Shapes: B rows, N query heads, K key-value heads, T tokens, D head_dim; S spans of a batch, Q and P
their padded queries and keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from q3q.models.kv_cache import Stored

# Most scores (spans x queries x keys, exact and rounded) of `attend_stored` at one time.
STORED_SCORES = 1 << 22


@dataclass(frozen=True)
class VarlenLayout:
    """Boundaries of spans that lie one behind the other, for attention without padding or masks.

    query_ends_S, key_ends_S: int32, cumulative lengths of the spans' queries and keys, from 0 on.
    longest: the largest number of queries, and of keys, of any span.
    causal: a span's last keys are its own tokens, and each token sees none behind itself; otherwise
        a query sees all keys of its span.
    """

    query_ends_S: Tensor
    key_ends_S: Tensor
    longest: tuple[int, int]
    causal: bool


def attend_masked(
    query_BNTD: Tensor, key_BKPD: Tensor, value_BKPD: Tensor, sees_xTP: Tensor
) -> Tensor:
    """Return each query's context [B, N, T, D] of the keys that it sees, at least one."""
    cpu = query_BNTD.device.type == "cpu"
    if not cpu:  # no kernel of a GPU takes both a mask and fewer key heads
        repeats = query_BNTD.shape[1] // key_BKPD.shape[1]
        key_BKPD = key_BKPD.repeat_interleave(repeats, dim=1)
        value_BKPD = value_BKPD.repeat_interleave(repeats, dim=1)
    return scaled_dot_product_attention(
        query_BNTD, key_BKPD, value_BKPD, attn_mask=sees_xTP, enable_gqa=cpu
    )


def attend_stored(
    query_SNQD: Tensor, stored: Stored, sees_SQP: Tensor, query_depth_SQ: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute `attend` over keys of which a query sees the exact or the rounded form.

    Args:
        sees_SQP: the keys that each query sees, as truth values; S may be 1 for all spans.
    """
    spans, _, queries, _ = query_SNQD.shape
    at_once = max(1, STORED_SCORES // (spans * stored.key_xPD.shape[-2]))
    contexts, logsums = [], []
    for start in range(0, queries, at_once):
        piece = slice(start, start + at_once)
        seen_SQP = stored.seen(sees_SQP[:, piece], query_depth_SQ[:, piece])
        bias_SQP = torch.zeros(seen_SQP.shape, dtype=query_SNQD.dtype, device=seen_SQP.device)
        bias_SQP = bias_SQP.masked_fill_(~seen_SQP, -torch.inf)
        context, logsum = attend(
            query_SNQD[:, :, piece], stored.key_xPD, stored.value_xPD, bias_SQP
        )
        contexts.append(context)
        logsums.append(logsum)
    return torch.cat(contexts, dim=2), torch.cat(logsums, dim=2)


def attend(
    query_SNQD: Tensor,
    key_SKPD: Tensor,
    value_SKPD: Tensor,
    bias_SQP: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute the context [S, N, Q, D], and the log of the softmax denominator [S, N, Q], float32.

    Args:
        bias_SQP: 0 where a query sees a key, else minus infinity; each query sees at least one.
        causal: query i sees keys 0 .. i.
    """
    if query_SNQD.device.type != "cpu":
        if bias_SQP is not None:  # of few scores: larger slices have no bias
            return attend_plain(query_SNQD, key_SKPD, value_SKPD, bias_SQP)
        repeats = query_SNQD.shape[1] // key_SKPD.shape[1]
        key_SNPD = key_SKPD.repeat_interleave(repeats, dim=1)
        value_SNPD = value_SKPD.repeat_interleave(repeats, dim=1)
        context, logsum, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query_SNQD, key_SNPD, value_SNPD, None, True, 0.0, causal
        )
        return context, logsum[..., : query_SNQD.shape[2]]  # the kernel pads logsum's rows
    bias = None if bias_SQP is None else bias_SQP[:, None]
    # scaled_dot_product_attention calls this kernel on a CPU, and drops the denominator.
    context, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query_SNQD, key_SKPD, value_SKPD, 0.0, causal, attn_mask=bias
    )
    return context, logsum


def attend_plain(
    query_SNQD: Tensor,
    key_SKPD: Tensor,
    value_SKPD: Tensor,
    bias_SQP: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `attend` by the formula, in float32, with all scores in memory: its plain twin."""
    grouped = query_SNQD.float().unflatten(1, (key_SKPD.shape[1], -1))
    scores = grouped @ key_SKPD.float()[:, :, None].transpose(-1, -2) / query_SNQD.shape[-1] ** 0.5
    if causal:
        bias_SQP = scores.new_full(scores.shape[-2:], -torch.inf).triu(1)[None]
    if bias_SQP is not None:
        scores = scores + bias_SQP[:, None, None]
    logsum = scores.logsumexp(-1)
    context = (scores - logsum[..., None]).exp() @ value_SKPD.float()[:, :, None]
    return context.flatten(1, 2).to(query_SNQD.dtype), logsum.flatten(1, 2)


def supports_varlen(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if `attend_varlen` runs there: 16-bit numbers, NVIDIA's Ampere or newer."""
    return (
        device.type == "cuda"
        and dtype in (torch.float16, torch.bfloat16)
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def attend_varlen(
    query_TND: Tensor, key_PKD: Tensor, value_PKD: Tensor, layout: VarlenLayout
) -> tuple[Tensor, Tensor]:
    """Compute the context [T, N, D] and, in float32, the log of the softmax denominator [T, N].

    Runs PyTorch's kernel of FlashAttention (arXiv 2307.08691) for sequences of different lengths.
    """
    ends = layout.query_ends_S, layout.key_ends_S
    context_TND, logsum_NT, *_ = torch.ops.aten._flash_attention_forward(
        query_TND, key_PKD, value_PKD, *ends, *layout.longest, 0.0, layout.causal, False
    )
    return context_TND, logsum_NT.transpose(0, 1)


def attend_varlen_plain(
    query_TND: Tensor, key_PKD: Tensor, value_PKD: Tensor, layout: VarlenLayout
) -> tuple[Tensor, Tensor]:
    """Compute `attend_varlen` span by span through `attend_plain`: its plain twin."""
    contexts, logsums = [], []
    queries, keys = layout.query_ends_S.diff().tolist(), layout.key_ends_S.diff().tolist()
    parts = query_TND.split(queries), key_PKD.split(keys), value_PKD.split(keys)
    for query_QND, key_QKD, value_QKD in zip(*parts, strict=True):
        wide, tall = len(query_QND), len(key_QKD)
        bias = query_QND.new_full((1, wide, tall), -torch.inf, dtype=torch.float32)
        bias = bias.triu(tall - wide + 1) if layout.causal else None
        states = query_QND, key_QKD, value_QKD
        query_1NQD, key_1KQD, value_1KQD = (x.transpose(0, 1)[None] for x in states)
        context_1NQD, logsum_1NQ = attend_plain(query_1NQD, key_1KQD, value_1KQD, bias)
        contexts.append(context_1NQD[0].transpose(0, 1))
        logsums.append(logsum_1NQ[0].transpose(0, 1))
    return torch.cat(contexts), torch.cat(logsums)
