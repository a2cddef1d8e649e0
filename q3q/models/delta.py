"""The gated delta rule behind a short causal convolution (Gated DeltaNet, arXiv 2412.06464).

A row carries two things from token to token: the last inputs of the convolution, and a matrix per
head, S [K, V], which maps keys to values. With a token's key k, value v and query q, its decay
0 < a <= 1 and its rate 0 < b < 1, equation 10 of the paper reads

    S <- a S + b k (v - a S^T k)^T,    output S^T q.

Shapes: B rows, T tokens, N value heads (each key head serves as many in a row), K and V the sizes
of a key and of a value, C channels of the convolution, W its width; n chunks of c tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import solve_triangular
from torch.nn.functional import conv1d, pad, silu, softplus

from q3q.models.delta_sizes import CHUNK, PIECE_TOKENS, DeltaSizes
from q3q.models.recurrence import State
from q3q.numerics.kernels.norm import rms_norm

# Queries, keys and values [B, N, T, K or V], decays and rates [B, N, T], as the rule reads them.
Heads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
NORM_EPS = 1e-6  # added to a key's and a query's squared length, as transformers does


@dataclass(frozen=True)
class GatedDelta:
    """A `Recurrence`: convolution, then the delta rule.

    An input is the channels of queries, keys and values, in this order, then each head's `b`, of
    which the sigmoid is the rate, and `a`, which makes the decay. An output is N heads' V numbers.

    convolution_CW: its weights, the newest token's last. log_rate_N, bias_N: of the decay,
    exp(-exp(log_rate) softplus(a + bias)).
    """

    sizes: DeltaSizes
    convolution_CW: Tensor
    log_rate_N: Tensor
    bias_N: Tensor

    def __call__(
        self, inputs_BTX: Tensor, state: State | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return outputs [B, T, N * V] in the inputs' dtype, and the state.

        The state is the convolution's last inputs [B, W - 1, C] and the matrices [B, N, K, V],
        float32.
        """
        sizes, tokens = self.sizes, inputs_BTX.shape[1]
        real_BT = None
        if lengths_B is not None:
            real_BT = torch.arange(tokens, device=inputs_BTX.device) < lengths_B[:, None]
            inputs_BTX = inputs_BTX.masked_fill(~real_BT[..., None], 0)
        mixed_BTC, b_BTN, a_BTN = inputs_BTX.split(
            (sizes.channels, sizes.value_heads, sizes.value_heads), dim=-1
        )
        before_BWC, before_BNKV = (None, None) if state is None else (state[0], state[1])
        mixed_BTC, last_BWC = self._convolve(mixed_BTC, before_BWC, lengths_B)
        rate_BTN = b_BTN.sigmoid().float()
        steps_BTN = softplus(a_BTN.float() + self.bias_N.float())
        decay_BTN = -self.log_rate_N.float().exp() * steps_BTN
        if real_BT is not None:  # a rate of 0 writes nothing, a logarithm of 0 forgets nothing
            rate_BTN, decay_BTN = (x * real_BT[..., None] for x in (rate_BTN, decay_BTN))
        keys = sizes.key_heads * sizes.key_dim
        query, key, value = mixed_BTC.split((keys, keys, sizes.value_heads * sizes.value_dim), -1)
        outputs, matrix_BNKV = delta_rule(
            query.unflatten(-1, (-1, sizes.key_dim)),
            key.unflatten(-1, (-1, sizes.key_dim)),
            value.unflatten(-1, (-1, sizes.value_dim)),
            decay_BTN,
            rate_BTN,
            before_BNKV,
        )
        return outputs.flatten(2), (last_BWC, matrix_BNKV)

    def _convolve(
        self, mixed_BTC: Tensor, last_BWC: Tensor | None, lengths_B: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return silu of each channel's convolution, and the last W - 1 inputs of each row."""
        rows, tokens, channels = mixed_BTC.shape
        width = self.convolution_CW.shape[1]
        if last_BWC is None:
            last_BWC = mixed_BTC.new_zeros(rows, width - 1, channels)
        joined_BTC = torch.cat((last_BWC.to(mixed_BTC.dtype), mixed_BTC), dim=1)
        convolved_BCT = conv1d(joined_BTC.mT, self.convolution_CW[:, None], groups=channels)
        if lengths_B is None:
            return silu(convolved_BCT, inplace=True).mT, joined_BTC[:, tokens:].clone()
        place_BW = lengths_B[:, None] + torch.arange(width - 1, device=mixed_BTC.device)
        index_BWC = place_BW[..., None].expand(-1, -1, channels)
        return silu(convolved_BCT, inplace=True).mT, joined_BTC.gather(1, index_BWC)


def delta_rule(
    query_BTMK: Tensor,
    key_BTMK: Tensor,
    value_BTNV: Tensor,
    decay_BTN: Tensor,
    rate_BTN: Tensor,
    matrix_BNKV: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return outputs [B, T, N, V] in the value's dtype, and the matrices behind the last tokens.

    All is computed in float32, and in chunks unless there is one token: a piece of a text at a
    time, so that what several value heads share is not copied for the whole text.

    Args:
        query_BTMK, key_BTMK: of M key heads, not normed yet.
        decay_BTN: the decay's logarithm, float32. rate_BTN: float32.
        matrix_BNKV: the matrices before the first token; None for zeros.
    """
    rows, tokens, heads, size = value_BTNV.shape
    if matrix_BNKV is None:
        shape = rows, heads, key_BTMK.shape[-1], size
        matrix_BNKV = value_BTNV.new_zeros(shape, dtype=torch.float32)
    parts = query_BTMK, key_BTMK, value_BTNV, decay_BTN, rate_BTN
    if tokens == 1:
        return delta_rule_plain(*parts, matrix_BNKV)
    most = max(1, PIECE_TOKENS // chunk)
    if rows > most:  # a piece takes a chunk of every row
        few = zip(*(x.split(most) for x in (*parts, matrix_BNKV)), strict=True)
        done = [delta_rule(q, k, v, a, b, s, chunk) for q, k, v, a, b, s in few]
        return torch.cat([part for part, _ in done]), torch.cat([part for _, part in done])
    outputs_BTNV = torch.empty_like(value_BTNV, memory_format=torch.contiguous_format)
    step = max(1, PIECE_TOKENS // (rows * chunk)) * chunk
    for start in range(0, tokens, step):
        heads_of_piece = _by_heads(*(x[:, start : start + step] for x in parts))
        output, matrix_BNKV = _in_chunks(heads_of_piece, matrix_BNKV, chunk)
        outputs_BTNV[:, start : start + step] = output.transpose(1, 2)
    return outputs_BTNV, matrix_BNKV


def delta_rule_plain(
    query_BTMK: Tensor,
    key_BTMK: Tensor,
    value_BTNV: Tensor,
    decay_BTN: Tensor,
    rate_BTN: Tensor,
    matrix_BNKV: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `delta_rule` token by token, by its formula: its plain twin."""
    query_BNTK, key_BNTK, value_BNTV, decay_BNT, rate_BNT = _by_heads(
        query_BTMK, key_BTMK, value_BTNV, decay_BTN, rate_BTN
    )
    if matrix_BNKV is None:
        matrix_BNKV = key_BNTK.new_zeros(
            *key_BNTK.shape[:2], key_BNTK.shape[3], value_BNTV.shape[3]
        )
    outputs = []
    for t in range(query_BNTK.shape[2]):
        key_BNK1 = key_BNTK[:, :, t, :, None]
        matrix_BNKV = matrix_BNKV * decay_BNT[:, :, t, None, None].exp()
        error_BNV = value_BNTV[:, :, t] - (key_BNK1 * matrix_BNKV).sum(2)
        matrix_BNKV = matrix_BNKV + key_BNK1 * (rate_BNT[:, :, t, None] * error_BNV)[:, :, None]
        outputs.append((query_BNTK[:, :, t, :, None] * matrix_BNKV).sum(2))
    return torch.stack(outputs, dim=1).to(value_BTNV.dtype), matrix_BNKV


def _by_heads(
    query_BTMK: Tensor,
    key_BTMK: Tensor,
    value_BTNV: Tensor,
    decay_BTN: Tensor,
    rate_BTN: Tensor,
) -> Heads:
    """Return all in float32 and by value heads, [B, N, T, ...]; queries and keys are normed."""
    repeats = value_BTNV.shape[2] // key_BTMK.shape[2]
    normed = []
    for x_BTMK in (query_BTMK, key_BTMK):
        wide = x_BTMK.float()
        wide = wide * (wide.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt()
        normed.append(wide.repeat_interleave(repeats, dim=2).transpose(1, 2))
    query_BNTK = normed[0] * query_BTMK.shape[-1] ** -0.5
    value_BNTV = value_BTNV.float().transpose(1, 2)
    return query_BNTK, normed[1], value_BNTV, decay_BTN.transpose(1, 2), rate_BTN.transpose(1, 2)


def _in_chunks(heads: Heads, matrix_BNKV: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return outputs [B, N, T, V] and the matrices, by the paper's chunked form (its section 3.3).

    Within a chunk, what each token writes, rate * (value - what the matrix holds at its key),
    depends on what the tokens before it wrote: a triangular system of equations, solved at once.
    """
    query_BNTK, key_BNTK, value_BNTV, decay_BNT, rate_BNT = heads
    tokens = query_BNTK.shape[2]
    chunk = min(chunk, tokens)
    missing = -tokens % chunk  # padded tokens have rate 0 and decay 1
    query, key, value = (
        pad(x, (0, 0, 0, missing)).unflatten(2, (-1, chunk))
        for x in (query_BNTK, key_BNTK, value_BNTV)
    )
    decay, rate = (pad(x, (0, missing)).unflatten(2, (-1, chunk)) for x in (decay_BNT, rate_BNT))
    total_BNnc = decay.cumsum(-1)  # the logarithm of all decays since the chunk's beginning
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=query.device).triu(1)
    between_BNncc = (total_BNnc[..., :, None] - total_BNnc[..., None, :]).masked_fill_(
        future, -torch.inf
    )
    between_BNncc.exp_()
    since = total_BNnc.exp()[..., None]
    rated_key = key * rate[..., None]
    system_BNncc = (rated_key @ key.mT).mul_(between_BNncc)
    # Right sides: of the values, and of the part that the matrix before the chunk holds already.
    sides = torch.cat((value * rate[..., None], rated_key * since), dim=-1)
    solved = solve_triangular(system_BNncc, sides, upper=False, unitriangular=True)
    fresh, held = solved.split((value.shape[-1], key.shape[-1]), dim=-1)
    scores_BNncc = (query @ key.mT).mul_(between_BNncc)
    query = query * since
    key = key * (total_BNnc[..., -1:] - total_BNnc).exp()[..., None]
    forgotten_BNn11 = total_BNnc[..., -1].exp()[..., None, None]
    outputs = torch.empty_like(value)
    for i in range(value.shape[2]):
        written_BNcV = fresh[:, :, i] - held[:, :, i] @ matrix_BNKV
        outputs[:, :, i] = query[:, :, i] @ matrix_BNKV + scores_BNncc[:, :, i] @ written_BNcV
        matrix_BNKV = matrix_BNKV * forgotten_BNn11[:, :, i] + key[:, :, i].mT @ written_BNcV
    return outputs.flatten(2, 3)[:, :, :tokens], matrix_BNKV


def gated_norm(x_xV: Tensor, gate_xV: Tensor, gain_V: Tensor, eps: float) -> Tensor:
    """Return the root-mean-square norm of each head's numbers, times silu of its gate.

    The gain here is not stored around 0.
    """
    normed_xV = rms_norm(x_xV, gain_V, eps).float()
    return normed_xV.mul_(silu(gate_xV.float())).to(x_xV.dtype)
