"""Check each fast path of a device against its plain twin: a part of `benchmarks/gpu_day.py`.

On a CPU the same checks run, on small shapes, with the paths that a CPU takes.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from q3q.config.model import DEMO_MODELS
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.scoring import Request, score
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import Decoder, load_decoder
from q3q.models.delta import delta_rule, delta_rule_plain
from q3q.models.softmax import (
    VarlenLayout,
    attend,
    attend_plain,
    attend_varlen,
    attend_varlen_plain,
    supports_varlen,
)
from q3q.models.spool import Spool
from q3q.number_formats import FLOATS
from q3q.numerics.grouped import (
    GroupedRows,
    Groups,
    grouped_linear,
    grouped_linear_plain,
    padded_runs,
)
from q3q.numerics.kernels.compiler import compiler_fault
from q3q.numerics.kernels.logsum import logsum, logsum_plain
from q3q.numerics.kernels.norm import rms_norm, rms_norm_plain
from q3q.numerics.levels import FloatLevels, IntegerLevels, Levels
from q3q.numerics.linalg import FiniteCheck, add_gram, add_grams, damped_factor, mirror
from q3q.numerics.packing import pack_bits, unpack_bits
from q3q.quantize.kernels.columns import block_solver, solve_block_plain


@dataclass(frozen=True)
class Sizes:
    """How large the checked tensors are.

    columns, tokens: of a Gram matrix and its inputs
    rows: of a weight whose columns are solved
    vocabulary: of logits
    counts: tokens of each expert
    """

    columns: int
    tokens: int
    rows: int
    vocabulary: int
    counts: tuple[int, ...]


SMALL = Sizes(columns=160, tokens=512, rows=48, vocabulary=1000, counts=(9, 0, 40, 3))
LARGE = Sizes(
    columns=4096, tokens=8192, rows=8192, vocabulary=151_936, counts=(512, 0, 700, 37, 90, 4000)
)


@dataclass(frozen=True)
class Result:
    """What a check found; `detail` gives the figure that was judged."""

    name: str
    passed: bool
    detail: str


def result(name: str, device: torch.device, sizes: Sizes) -> Result:
    """Run one of `CHECKS`; an error in it is its result, and the others can go on."""
    try:
        passed, detail = CHECKS[name](device, sizes)
    except Exception as error:
        passed, detail = False, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return Result(name, passed, detail)


def _draw(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference, relative to what is expected."""
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def _below(error: float, bound: float) -> tuple[bool, str]:
    return error <= bound, f"relative difference {error:.1e}, at most {bound:.0e}"


def _triton(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    """Otherwise the checks of its kernels would compare plain twins with themselves."""
    if device.type != "cuda":
        return True, "not for this device, which takes the plain twins"
    fault = compiler_fault()
    return fault is None, fault or "a first kernel ran"


def _columns(device: torch.device, sizes: Sizes, levels: Levels) -> tuple[bool, str]:
    columns = min(128, sizes.columns)
    weight_ECO = _draw(device, 1, columns, sizes.rows)
    upper_CC = 0.1 * _draw(device, columns, columns, seed=1).triu(1)
    factor_ECC = (torch.eye(columns, device=device) + upper_CC)[None]
    scale_EKO = _draw(device, 1, 1, sizes.rows, seed=2).abs() + 0.1
    zero_EKO = torch.full_like(scale_EKO, 8.0)
    rest = factor_ECC, scale_EKO, zero_EKO, [0] * columns, levels
    codes, _ = block_solver(device, levels)(weight_ECO.clone(), *rest)
    plain, _ = solve_block_plain(weight_ECO.clone(), *rest)
    same = float((codes == plain).all(1).double().mean())  # a tie decides the rest of its row
    return same > 0.95, f"{same:.1%} of rows have the same codes, at least 95%"


def _factors(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    """All experts' matrices in one call, and one by one, with the seconds of both."""
    x_ETI = _draw(device, 8, sizes.columns, sizes.columns // 2)
    hessian_EII = x_ETI.mT @ x_ETI

    def together() -> Tensor:
        return damped_factor(hessian_EII, 0.01)[0]

    def one_by_one() -> Tensor:
        return torch.cat([damped_factor(hessian_EII[e : e + 1], 0.01)[0] for e in range(8)])

    expected = one_by_one()
    passed, detail = _below(_distance(together(), expected), bound=1e-3)
    seconds = [_seconds(work, device) for work in (together, one_by_one)]
    return passed, "{}; {:.3f} s together, {:.3f} s one by one".format(detail, *seconds)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    begin = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begin


def _logsum(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    logits = (_draw(device, 70, sizes.vocabulary) * 5).bfloat16()
    found, highest = logsum(logits)
    expected, expected_highest = logsum_plain(logits.clone())
    error = float((found - expected).abs().max())
    exact = torch.equal(highest, expected_highest)
    return exact and error < 1e-4, f"largest difference {error:.1e}, at most 1e-04"


def _norm(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    """Of a block's hidden states, and of heads; with a gain that is stored around 0 too."""
    worst, same = 0.0, 1.0
    for width, offset in ((sizes.columns, 0.0), (sizes.columns, 1.0), (128, 0.0)):
        x = (_draw(device, 3, sizes.tokens // 3, width) * 9).bfloat16()
        gain = _draw(device, width, seed=1).bfloat16()
        found, expected = (norm(x, gain, 1e-6, offset) for norm in (rms_norm, rms_norm_plain))
        worst = max(worst, _distance(found, expected))
        same = min(same, float((found == expected).float().mean()))
    passed = worst < 1e-3 and same > 0.999
    return passed, f"{same:.2%} of numbers are equal, distance {worst:.1e}, at most 1e-03"


def _attention(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    query, key, value = (_draw(device, 2, heads, 200, 64, seed=heads) for heads in (8, 4, 4))
    (found, logsums), (expected, expected_logsums) = (
        attention(query, key, value, None, True) for attention in (attend, attend_plain)
    )
    return _below(max(_distance(found, expected), _distance(logsums, expected_logsums)), bound=1e-3)


def _varlen(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    if not supports_varlen(device, torch.bfloat16):
        return True, "not for this device, which takes the plain twin"
    queries, keys = [1, 70, 3, 200, 1], [5, 70, 64, 331, 1]
    ends = [
        torch.tensor([0, *torch.tensor(each).cumsum(0)], dtype=torch.int32, device=device)
        for each in (queries, keys)
    ]
    layout = VarlenLayout(ends[0], ends[1], (max(queries), max(keys)), causal=True)
    query = _draw(device, sum(queries), 16, 128).bfloat16()
    key, value = (_draw(device, sum(keys), 8, 128, seed=s).bfloat16() for s in (1, 2))
    found, _ = attend_varlen(query, key, value, layout)
    expected, _ = attend_varlen_plain(query.float(), key.float(), value.float(), layout)
    return _below(_distance(found, expected), bound=2e-2)


def _tree(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    """Scores along a tree of prefixes, in several batches, against rows that are whole texts."""
    requests, budget = _questions(sizes.tokens), TokenBudget(sizes.tokens // 2, sizes.tokens // 2)
    some = range(0, len(requests), 7)
    wide, narrow = (
        load_decoder(Checkpoint(DEMO_MODELS / "dense"), dtype, device)
        for dtype in (torch.float32, torch.bfloat16)
    )
    batches = [completed for completed, _ in score(narrow, requests, budget)]
    scores = {number: found.log_likelihood for batch in batches for number, found in batch}
    found = torch.tensor([scores[number] for number in some], dtype=torch.float64)
    exact, rows = (_whole_texts(model, [requests[n] for n in some]) for model in (wide, narrow))
    error, twins = (float((each - exact).abs().mean()) for each in (found, rows))
    detail = f"{len(batches)} batches, {error:.1e} nats from float32, its twin {twins:.1e}"
    return len(batches) > 1 and error <= 2 * twins, f"{detail}, at most twice that"


def _questions(tokens: int) -> list[Request]:
    """Return 32 questions on one text, each with four answers: batches share the text's keys."""
    random = np.random.default_rng(0)

    def drawn(count: int) -> NDArray[np.int32]:
        return random.integers(0, 4096, count, dtype=np.int32)

    requests, text = [], drawn(min(tokens // 4, 1024))
    for _ in range(32):
        question = np.concatenate((text, drawn(tokens // 64)))
        for count in random.integers(1, tokens // 128, 4):
            ids = np.concatenate((question, drawn(count)))
            requests.append(Request(ids[:-1], ids[-count:], "tree"))
    return requests


def _whole_texts(model: Decoder, requests: Sequence[Request]) -> Tensor:
    """Return each request's log-likelihood, of a row of its own."""
    scores = []
    for request in requests:
        ids, targets = (
            torch.from_numpy(tokens.astype(np.int64))
            for tokens in (request.inputs, request.targets)
        )
        hidden_PH = model.hidden(ids[None])[0, -len(targets) :]
        scores.append(float(model.log_likelihoods(hidden_PH, targets)[0].double().sum()))
    return torch.tensor(scores, dtype=torch.float64)


def _gram(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    """The 16-bit product is as close to float64 as that of float32, up to the order of sums."""
    x = _draw(device, sizes.tokens, sizes.columns) * _draw(device, sizes.columns, seed=1).exp()
    x = x.bfloat16()
    narrow, wide = (torch.zeros(sizes.columns, sizes.columns, device=device) for _ in range(2))
    for part in x.split(sizes.tokens // 4):
        add_gram(narrow, part)
        add_gram(wide, part.float())
    for total in (narrow, wide):
        mirror(total[None])
    exact = x.double().T @ x.double()
    error, twins = _distance(narrow, exact), _distance(wide, exact)
    passed = error <= 1e-5 and error <= max(4 * twins, 1e-6)
    return passed, f"error {error:.1e}, its float32 twin's {twins:.1e}"


def _experts(device: torch.device, sizes: Sizes) -> GroupedRows:
    counts = torch.tensor(sizes.counts)
    group_R = torch.arange(len(counts)).repeat_interleave(counts).to(device)
    columns = sizes.columns // 2
    rows = _draw(device, len(group_R), columns).bfloat16()
    return GroupedRows(rows, Groups.of_sorted(group_R, len(counts)))


def _grams(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    grouped = _experts(device, sizes)
    columns = grouped.rows_RI.shape[1]
    together, alone = (torch.zeros(len(grouped), columns, columns, device=device) for _ in range(2))
    for run, padded in padded_runs(grouped):
        add_grams(together[run], padded, fresh=True)
    for e, rows in enumerate(grouped):
        add_gram(alone[e], rows.float(), fresh=True)
    mirror(together)
    mirror(alone)
    return _below(_distance(together, alone), bound=1e-5)


def _grouped(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    grouped = _experts(device, sizes)
    shape = len(grouped), sizes.columns // 4, grouped.rows_RI.shape[1]
    weight = _draw(device, *shape, seed=1).bfloat16()
    found = grouped_linear(grouped.rows_RI, weight, grouped.groups)
    expected = grouped_linear_plain(grouped.rows_RI, weight, grouped.groups)
    return _below(_distance(found, expected), bound=4e-3)


def _delta(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    query, key = (_draw(device, 2, 300, 2, 64, seed=seed).bfloat16() for seed in (1, 2))
    value = _draw(device, 2, 300, 4, 64, seed=3).bfloat16()
    decay = -_draw(device, 2, 300, 4, seed=4).abs()
    rate = _draw(device, 2, 300, 4, seed=5).sigmoid()
    found, expected = (
        rule(query, key, value, decay, rate)[0] for rule in (delta_rule, delta_rule_plain)
    )
    return _below(_distance(found, expected), bound=1e-2)


def _main_memory(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    """What the device has no room for comes back bit for bit."""
    hidden = _draw(device, 6, sizes.tokens // 4, sizes.columns).bfloat16()
    with Spool(2 * hidden[0].nbytes, pinned=2 * hidden.nbytes) as spool:
        spool.extend(hidden)
        same = all(torch.equal(found, put) for found, put in zip(spool, hidden, strict=True))
        return same and spool.moved == 4, f"{spool.moved} of 6 tensors were there, 4 should be"


def _packed(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    wrong = []
    for bits in range(1, 9):
        generator = torch.Generator().manual_seed(bits)
        codes = torch.randint(
            2**bits, (7, sizes.columns + 3), generator=generator, dtype=torch.uint8
        )
        words = pack_bits(codes.to(device), bits)
        back = unpack_bits(words, bits, codes.shape[1])
        if not torch.equal(words.cpu(), pack_bits(codes, bits)) or not torch.equal(
            back.cpu(), codes
        ):
            wrong.append(bits)
    return not wrong, f"differ at bits {wrong}" if wrong else "the same words at 1 to 8 bits"


def _finite(device: torch.device, sizes: Sizes) -> tuple[bool, str]:
    good = _draw(device, 1000, 3).bfloat16()
    bad = good.clone()
    bad[500, 1] = torch.nan
    checks = FiniteCheck(), FiniteCheck()
    for check, tensors in zip(checks, ((good, good), (good, bad)), strict=True):
        for tensor in tensors:
            check.note(tensor)
    return checks[0].passed() and not checks[1].passed(), "one NaN among 3,000 numbers"


CHECKS: dict[str, Callable[[torch.device, Sizes], tuple[bool, str]]] = {
    "Triton compiles": _triton,
    "GPTQ's columns": partial(_columns, levels=IntegerLevels(4, False)),
    "GPTQ's columns, FP4": partial(_columns, levels=FloatLevels(FLOATS["mxfp4"], 32)),
    "factors of experts": _factors,
    "sum over logits": _logsum,
    "norm": _norm,
    "attention in float32": _attention,
    "attention over spans": _varlen,
    "scores along a tree of prefixes": _tree,
    "Gram matrix of bfloat16 tokens": _gram,
    "Gram matrices of padded experts": _grams,
    "grouped products of experts": _grouped,
    "the delta rule in chunks": _delta,
    "activations in main memory": _main_memory,
    "packed codes": _packed,
    "the check for finite numbers": _finite,
}
