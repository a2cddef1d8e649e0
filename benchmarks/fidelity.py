"""Run the study's grid on the demo models and write the tables of docs/FIDELITY.md.

`python benchmarks/fidelity.py STORAGE` runs what is missing in STORAGE through launch.py (RTN, GPTQ
and AWQ at 8, 4, 3 and 2 bits per channel and in groups of 128; SmoothQuant w8a8, w4a8 and w4a4,
smoothed and as the study's script ran it; BiLLM), then reads the records and rewrites the page
between its markers. The records decide whether an ordering that the study reports holds here. A
model without records keeps what the page says of it.
Options: --models, --methods (fewer cells), --tables (write from existing records, run nothing).
"""

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "FIDELITY.md"
MODELS = ("demo", "demo_moe", "demo_hybrid")
TEXTS = ("library", "stories")
WEIGHT_ONLY = ("rtn", "gptq", "awq")
SWEEPS = {
    "none": ["method=none"],
    **{name: [f"method={name}", "bits=8,4,3,2", "group_size=-1,128"] for name in WEIGHT_ONLY},
    "smoothquant": ["method=smoothquant", "method.smooth=true,false", "bits=8,4", "act_bits=8"],
    "smoothquant_w4a4": ["method=smoothquant", "method.smooth=true,false", "bits=4", "act_bits=4"],
    "billm": ["method=billm", "group_size=128"],
}
LOSSLESS, KEPT, COLLAPSED = 1.01, 2.0, 10.0  # perplexity over the unquantized model's


@dataclass(frozen=True)
class Cell:
    """A trial: its place in the grid and its scores.

    perplexity: by text, infinite if it diverged
    """

    method: str
    bits: int
    group_size: int
    act_bits: int | None
    perplexity: dict[str, float]
    accuracy: float
    bits_per_weight: float

    @property
    def name(self) -> str:
        if not self.bits:
            return "unquantized"
        act = f"a{self.act_bits}" if self.act_bits else ""
        group = "per channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"{self.method} w{self.bits}{act} {group}"


@dataclass(frozen=True)
class Grid:
    """A model's cells by (method, bits, group size, activation bits), and the text to judge by.

    group_size: columns of a group where it is not the whole row
    """

    cells: dict[tuple[str, int, int, int | None], Cell] = field(default_factory=dict)
    text: str = TEXTS[0]
    group_size: int = 128

    def named(self, method: str, bits: int) -> list[tuple[str, float]]:
        """Return the losses of whole rows and of groups, with their names."""
        size = self.group_size
        return [
            (f"{method} pc", self.loss(method, bits)),
            (f"{method} g{size}", self.loss(method, bits, size)),
        ]

    def loss(
        self, method: str, bits: int, group_size: int = -1, act_bits: int | None = None
    ) -> float:
        """Perplexity over the unquantized model's; nan if either was not run."""
        cell, reference = (
            self.cells.get((method, bits, group_size, act_bits)),
            self.cells.get(("none", 0, 0, None)),
        )
        return (
            cell.perplexity[self.text] / reference.perplexity[self.text]
            if cell and reference
            else math.nan
        )


def run(storage: Path, models: list[str], methods: list[str]) -> None:
    for name, overrides in SWEEPS.items():
        if name.split("_")[0] in methods:
            command = [sys.executable, "launch.py", "-m", f"model={','.join(models)}", *overrides]
            # A sweep with a failed trial ends with 1; the table then says that its cell is missing.
            subprocess.run(
                [*command, f"storage={storage}"],
                cwd=ROOT,
                env={**os.environ, "TQDM_DISABLE": "1"},
                check=False,
            )


def read(storage: Path, model: str) -> Grid:
    """The cells among a storage folder's records."""
    grid = Grid()
    for path in sorted(storage.glob("trials/*/record.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        spec, metrics = record["spec"], record["metrics"]
        if spec["model"]["name"] != model or record["status"] != "COMPLETED":
            continue
        method, scheme = spec["method"], spec["scheme"] or {}
        metrics |= dict.fromkeys(record["diverged"], math.inf)
        accuracies = [value for name, value in metrics.items() if name.endswith("/acc")]
        cell = Cell(
            method=method["name"] if method.get("smooth", True) else "rtn w/a",
            bits=scheme.get("bits", 0),
            group_size=scheme.get("group_size", 0),
            act_bits=scheme.get("act_bits"),
            perplexity={text: metrics[f"perplexity/{text}"] for text in TEXTS},
            accuracy=sum(accuracies) / len(accuracies),
            bits_per_weight=metrics["bits_per_weight"],
        )
        grid.cells[cell.method, cell.bits, cell.group_size, cell.act_bits] = cell
    return grid


Judgement = tuple[bool | None, str]  # holds or not, None if a cell is missing; the numbers


def losses_at(grid: Grid, bits: int) -> list[tuple[str, float]]:
    return [pair for method in WEIGHT_ONLY for pair in grid.named(method, bits)]


def judged(holds: Callable[[], bool], losses: Iterable[tuple[str, float]]) -> Judgement:
    losses = list(losses)
    if any(math.isnan(loss) for _, loss in losses):
        return None, ", ".join(name for name, loss in losses if math.isnan(loss))
    return holds(), ", ".join(f"{name} x{number(loss)}" for name, loss in losses)


def each_at(bits: int, law: Callable[[str, float], bool]) -> Callable[[Grid], Judgement]:
    """Judge whether the law holds for the name and the loss of each method at this width."""

    def judge(grid: Grid) -> Judgement:
        losses = losses_at(grid, bits)
        return judged(lambda: all(law(name, loss) for name, loss in losses), losses)

    return judge


def gptq_best_at_two(grid: Grid) -> Judgement:
    losses = losses_at(grid, 2)
    return judged(lambda: min(losses, key=lambda pair: pair[1])[0].startswith("gptq"), losses)


def groups(method: str) -> Callable[[Grid], Judgement]:
    def judge(grid: Grid) -> Judgement:
        losses = [
            (name.replace(method, f"w{bits}"), loss)
            for bits in (4, 3, 2)
            for name, loss in grid.named(method, bits)
        ]
        return judged(lambda: all(losses[i + 1][1] < losses[i][1] for i in (0, 2, 4)), losses)

    return judge


def smooth_steps(method: str) -> Callable[[Grid], Judgement]:
    def judge(grid: Grid) -> Judgement:
        losses = [(f"w{w}a{a}", grid.loss(method, w, -1, a)) for w, a in ((8, 8), (4, 8), (4, 4))]
        return judged(
            lambda: losses[0][1] < losses[1][1] < losses[2][1] and losses[2][1] > COLLAPSED,
            losses,
        )

    return judge


def w4a8_worse(grid: Grid) -> Judgement:
    losses = [("smoothquant w4a8", grid.loss("smoothquant", 4, -1, 8))]
    losses += [(f"{m} w4 pc", grid.loss(m, 4)) for m in ("gptq", "awq")]
    return judged(lambda: losses[0][1] > max(loss for _, loss in losses[1:]), losses)


def billm_above_two_bits(grid: Grid) -> Judgement:
    size = grid.group_size
    losses = [("billm", grid.loss("billm", 1, size))]
    for method, bits in (("rtn", 2), ("awq", 2), ("awq", 3)):
        losses.append((f"{method} w{bits} g{size}", grid.loss(method, bits, size)))
    return judged(lambda: losses[3][1] < losses[0][1] < min(losses[1][1], losses[2][1]), losses)


CLAIMS: list[tuple[str, Callable[[Grid], Judgement]]] = [
    (
        f"8 bits cost nearly nothing (less than {LOSSLESS - 1:.0%}), whichever method and group",
        each_at(8, lambda name, loss: loss < LOSSLESS),
    ),
    (
        f"4 bits cost noticeably (more than {LOSSLESS - 1:.0%}), whichever method and group",
        each_at(4, lambda name, loss: loss > LOSSLESS),
    ),
    (
        f"at 3 bits AWQ alone keeps the model (below x{KEPT:g})",
        each_at(3, lambda name, loss: (loss < KEPT) == name.startswith("awq")),
    ),
    (
        f"at 2 bits GPTQ alone keeps something (below x{COLLAPSED:g})",
        each_at(2, lambda name, loss: (loss < COLLAPSED) == name.startswith("gptq")),
    ),
    ("at 2 bits GPTQ is the best of the three", gptq_best_at_two),
    ("GPTQ: groups are better than whole rows", groups("gptq")),
    (
        "AWQ: groups are better than whole rows (the study's tables have it the other way round)",
        groups("awq"),
    ),
    (
        f"SmoothQuant: w8a8, w4a8, w4a4 each worse, and w4a4 collapses (above x{COLLAPSED:g})",
        smooth_steps("smoothquant"),
    ),
    ("The same of what the study's script ran, without smoothing", smooth_steps("rtn w/a")),
    ("SmoothQuant w4a8 is worse than GPTQ and AWQ at 4 bits", w4a8_worse),
    (
        "BiLLM lies between 3-bit AWQ and the other methods' 2 bits (on the study's small models)",
        billm_above_two_bits,
    ),
]


VERDICT = {None: "not run", True: "holds", False: "does not"}


def number(value: float) -> str:
    if not math.isfinite(value):
        return "diverged"
    return f"{value:.3f}" if value < 100 else f"{value:.3g}"


def grid_table(grid: Grid) -> str:
    order = ("none", "rtn", "gptq", "awq", "smoothquant", "rtn w/a", "billm")
    cells = sorted(
        grid.cells.values(),
        key=lambda c: (order.index(c.method), c.group_size, -c.bits, -(c.act_bits or 0)),
    )
    texts = " | ".join(f"perplexity, {text}" for text in TEXTS)
    lines = [
        f"| cell | bits a weight | {texts} | mean accuracy |",
        "|---|---|---|---|---|",
    ]
    for cell in cells:
        perplexities = " | ".join(number(cell.perplexity[text]) for text in TEXTS)
        lines.append(
            f"| {cell.name} | {cell.bits_per_weight:.2f} | {perplexities} | {cell.accuracy:.1%} |"
        )
    return "\n".join(lines)


def claims_table(grids: dict[str, Grid], before: dict[tuple[str, ...], list[str]]) -> str:
    """Judge the claims by each grid; models without one keep their rows of `before`."""
    lines = [
        f"| the study | model | {' | '.join(f'here, {text}' for text in TEXTS)} |",
        "|---|---|---|---|",
    ]
    for claim, judge in CLAIMS:
        for model in MODELS:
            if (grid := grids.get(model)) is None:
                if row := before.get((claim, model)):
                    lines.append(f"| {' | '.join(row)} |")
                continue
            found = [judge(replace(grid, text=text)) for text in TEXTS]
            verdicts = " | ".join(f"{VERDICT[holds]}: {how}" for holds, how in found)
            lines.append(f"| {claim} | {model} | {verdicts} |")
    return "\n".join(lines)


def tf32(x: "torch.Tensor") -> "torch.Tensor":
    """Round float32's mantissas to ten bits, as tensor cores read them."""
    import torch

    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def exactness_table() -> str:
    """Tabulate, by the activations' dtype, what narrower products change, and the sums' error."""
    import torch

    from q3q.data.texts import load_text
    from q3q.data.windows import draw_windows, encoder
    from q3q.models.anatomy import SiteInput
    from q3q.models.checkpoint import Checkpoint, load_tokenizer
    from q3q.models.decoder import load_decoder
    from q3q.quantize.statistics import Gram

    checkpoint = Checkpoint(ROOT / "q3q/models/demo/dense")
    encode = encoder(load_tokenizer(checkpoint.folder))
    text = load_text("demo", split="calibration")
    windows = draw_windows(text, encode, samples=32, length=256, draw="random", seed=0)
    lines = [
        "| activations | numbers that TF32 changes | numbers that bfloat16 changes | "
        "largest error of a site's float32 sums, 2048 tokens at a time | 256 at a time |",
        "|---|---|---|---|---|",
    ]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        count, by_tf32, by_bfloat16 = 0, 0, 0
        errors = {2048: 0.0, 256: 0.0}
        with torch.inference_mode():
            decoder = load_decoder(checkpoint, dtype)
            hidden = decoder.embed(windows)
            for block in decoder.blocks:
                for _, inputs in block.stages(hidden, decoder.rope):
                    assert inputs.all_TI is not None
                    x = inputs.all_TI.float()
                    count += x.numel()
                    by_tf32 += int((tf32(x) != x).sum())
                    by_bfloat16 += int((x.bfloat16() != x).sum())
                    exact = x.double().T @ x.double()
                    for size, largest in errors.items():
                        gram = Gram()
                        for part in inputs.all_TI.split(size):
                            gram.update(SiteInput(part, [part]))
                        error = float((gram.sum_EII[0] - exact).norm() / exact.norm())
                        errors[size] = max(largest, error)
                hidden = block(hidden, decoder.rope)
        name = str(dtype).removeprefix("torch.")
        shares = f"{by_tf32 / count:.1%} | {by_bfloat16 / count:.1%}"
        lines.append(f"| {name} | {shares} | {errors[2048]:.1e} | {errors[256]:.1e} |")
    return "\n".join(lines)


def hessian_table() -> str:
    """Tabulate the errors of each site's Gram matrix and 4-bit codes by accumulation precision."""
    import torch

    from q3q.data.texts import load_text
    from q3q.data.windows import draw_windows, encoder
    from q3q.models.anatomy import SiteInput
    from q3q.models.checkpoint import Checkpoint, load_tokenizer
    from q3q.models.decoder import load_decoder
    from q3q.quantize.methods.gptq import gptq_round
    from q3q.quantize.sites import stack_rows
    from q3q.quantize.statistics import Gram
    from q3q.spec import Scheme

    def product(x: torch.Tensor) -> torch.Tensor:
        gram = Gram()
        for part in x.split(2048):
            gram.update(SiteInput(part, [part]))
        return gram.sum_EII[0]

    checkpoint = Checkpoint(ROOT / "q3q/models/demo/dense")
    text = load_text("demo", split="calibration")
    encode = encoder(load_tokenizer(checkpoint.folder))
    scheme = Scheme(bits=4, group_size=128, symmetric=False)
    kinds = {
        "float32 (q3q's)": product,
        "TF32 products, emulated": lambda x: product(tf32(x)),
        "bfloat16 inputs, float32 sums": lambda x: product(x.bfloat16().float()),
    }
    errors: dict[str, list[float]] = {name: [] for name in kinds}
    codes: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.inference_mode():
        decoder = load_decoder(checkpoint, torch.float32)
        hidden = decoder.embed(
            draw_windows(text, encode, samples=32, length=256, draw="random", seed=0)
        )
        for block in decoder.blocks:
            stages = block.stages(hidden, decoder.rope)
            for site in block.sites:
                _, inputs = next(stages)
                if inputs.all_TI is None or len(inputs.experts) > 1:
                    continue  # one site of each kind says enough
                weight_EOI, _ = stack_rows(block.weights, site)
                exact = inputs.all_TI.double().T @ inputs.all_TI.double()

                def solve(
                    gram: torch.Tensor, weight_EOI: torch.Tensor = weight_EOI
                ) -> torch.Tensor:
                    return gptq_round(
                        weight_EOI, gram.float()[None], scheme, act_order=True
                    ).weight.codes_EOI

                wanted = solve(exact / len(inputs.all_TI))
                for name, accumulate in kinds.items():
                    found = accumulate(inputs.all_TI)
                    errors[name].append(float((found.double() - exact).norm() / exact.norm()))
                    codes[name].append(
                        float((solve(found / len(inputs.all_TI)) != wanted).float().mean())
                    )
            hidden = block(hidden, decoder.rope)
    lines = [
        "| accumulation | largest relative error of a site | 4-bit codes that differ, mean |",
        "|---|---|---|",
    ]
    for name in kinds:
        lines.append(
            f"| {name} | {max(errors[name]):.1e} | {sum(codes[name]) / len(codes[name]):.2%} |"
        )
    return "\n".join(lines)


def rewrite(page: str, marker: str, content: str) -> str:
    head, _, tail = _around(page, marker)
    return f"{head}<!-- {marker} -->\n{content}\n<!-- /{marker} -->{tail}"


def rows_on(page: str, marker: str, keys: int) -> dict[tuple[str, ...], list[str]]:
    """Return the rows of a table that stands on the page, by their first cells."""
    _, content, _ = _around(page, marker)
    lines = [line for line in content.splitlines() if line.startswith("|")][2:]
    rows = [[cell.strip() for cell in line[1:-1].split(" |")] for line in lines]
    return {tuple(row[:keys]): row for row in rows}


def _around(page: str, marker: str) -> tuple[str, str, str]:
    start, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
    if page.count(start) != 1 or page.count(end) != 1:
        raise SystemExit(f"{PAGE} needs {start} and {end}, once each")
    head, rest = page.split(start)
    content, tail = rest.split(end)
    return head, content, tail


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "storage", type=Path, help="folder of trials; what is done there already is not run again"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[n for n in SWEEPS if "_" not in n],
        help="cells of these alone",
    )
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    storage = options.storage.absolute()
    if not options.tables:
        run(storage, options.models, options.methods)
    grids = {model: grid for model in options.models if (grid := read(storage, model)).cells}
    page = PAGE.read_text(encoding="utf-8")
    for model, grid in grids.items():
        page = rewrite(page, f"grid {model}", grid_table(grid))
    page = rewrite(page, "claims", claims_table(grids, rows_on(page, "claims", 2)))
    page = rewrite(page, "hessians", hessian_table())
    page = rewrite(page, "exactness", exactness_table())
    PAGE.write_text(page, encoding="utf-8")
    print(page[page.index("## ") :])


if __name__ == "__main__":
    main()
