"""Each method's knobs: the dataclass is its config.

Without torch, so that --help and completion start fast.
"""

from dataclasses import asdict, dataclass, field
from typing import ClassVar

from q3q.models.footprint import MethodMemory
from q3q.number_formats import BLOCKS, FORMATS, INT
from q3q.spec import Json, Scheme


@dataclass(frozen=True)
class Work:
    """The computing that a method takes, for the plan's predictions.

    passes: forward passes of all calibration windows, and other work in units of such a pass
    solves: each site's Hessian is factored, and its weights are treated column by column
    weight_operations: operations per weight; 1,000 is rounding to nearest (0.12 s for 4.7 million
        on one core)
    variants: number of variants that are tried, each on `variant_windows` calibration windows
    """

    passes: float = 1.0
    solves: bool = False
    weight_operations: float = 1_000.0
    variants: int = 0
    variant_windows: int = 0


@dataclass(frozen=True)
class Appearance:
    """How reports show a method.

    title: its name in printed tables; empty for the method's own name.
    row: its position among the rows of one bit width in printed tables.
    colour: index of its colour and symbol in plots; None for the first that is free.
    yardstick: other methods are compared with it, so tables list it right after the
        unquantized model.
    """

    title: str = ""
    row: int = 100
    colour: int | None = None
    yardstick: bool = False


@dataclass
class MethodSettings:
    """A method's knobs (fields), and what the rest of q3q must know about it (class attributes).

    A method of another package is planned, shown and compared by the same attributes as ours.

    version: raise it when a change can change the numbers: finished trials then run again
    implementation: `module:Class` of its Method
    appearance: in tables and plots
    bits: bits per weight that it can take
    formats: of codes, names of `number_formats`; a method takes them by rounding through
        `SiteTask.levels_for`
    quantizes: False evaluates the model as it is
    rebalances: it shifts scale between tensors that all linears of a site share: these must have
        one scheme
    chunks_experts: a site's experts are observed and quantized in chunks, not all at the same time;
        None: unless it rebalances. A method that rebalances finds a scale that all experts share
        with the first chunk's statistics of the experts, and an expert's own with those of its
        chunk
    sequential: each site sees the inputs that the block's already quantized sites produce, in one
        forward pass; otherwise all sites are observed with the block's original weights first
    whole_zeros: its zero points are codes (0 to 2**bits - 1); otherwise they take 16 bits each, and
        most export formats cannot hold them
    keeps_hessian: it keeps a float32 [I, I] of each site's inputs (per expert, if routed)
    block_copies: copies of a block in memory while it is quantized; fewer for a sequential method,
        which frees each weight that it replaces
    inputs_held: hidden states of all windows that are in memory at the same time: 1 between two
        blocks, and 1 more for each stored input of a site
    default_*: the meaning of null in its config; default_act_bits=None are 16-bit activations
    """

    name: str = "???"

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = ""
    appearance: ClassVar[Appearance] = Appearance()
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
    formats: ClassVar[tuple[str, ...]] = (INT,)
    quantizes: ClassVar[bool] = True
    rebalances: ClassVar[bool] = False
    chunks_experts: ClassVar[bool | None] = None
    sequential: ClassVar[bool] = False
    whole_zeros: ClassVar[bool] = True
    keeps_hessian: ClassVar[bool] = True
    block_copies: ClassVar[float] = 2.5
    inputs_held: ClassVar[int] = 1
    default_bits: ClassVar[int] = 4
    default_group_size: ClassVar[int] = 128
    default_symmetric: ClassVar[bool] = False
    default_act_bits: ClassVar[int | None] = None
    default_samples: ClassVar[int] = 128
    default_length: ClassVar[int] = 2048
    default_draw: ClassVar[str] = "random"

    def problem(self) -> str | None:
        """Return one line that says what is wrong with the knobs, or None."""
        return None

    def clash(self, scheme: Scheme) -> str | None:
        """Return one line that says why the method cannot take this valid scheme, or None."""
        if scheme.format not in self.formats:
            return (
                f"method={self.name} cannot do format={scheme.format}; it takes "
                f"format={','.join(self.formats)}"
            )
        if getattr(self, "mse", False) and scheme.format in BLOCKS:
            return (
                f"method.mse=true has no effect with format={scheme.format}, whose scales are "
                "chosen as llama.cpp chooses them: leave it out"
            )
        if getattr(self, "mse", False) and (scheme.four_over_six or scheme.group_rows != 1):
            other = (
                "four_over_six=true chooses each group's scale"
                if scheme.four_over_six
                else f"with group_rows={scheme.group_rows} rows share a scale"
            )
            return f"method.mse=true searches a scale for each group, and {other}: drop one of them"
        if scheme.bits in self.bits:
            return None
        least, most = min(self.bits), max(self.bits)
        gapless = len(self.bits) > 1 and set(self.bits) == set(range(least, most + 1))
        taken = f"{least} to {most}" if gapless else ", ".join(map(str, self.bits))
        return f"method={self.name} cannot do bits={scheme.bits}; it takes {taken}"

    def observes(self) -> bool:
        """Return True if, with these knobs, the method reads calibration text."""
        return False

    def knobs(self, scheme: Scheme | None) -> Json:
        """Return the knobs that a trial's spec has: those that have an effect."""
        return asdict(self)

    def takes_chunks(self) -> bool:
        """Return `chunks_experts`, or what it is unless a method says so."""
        return not self.rebalances if self.chunks_experts is None else self.chunks_experts

    def memory(self) -> MethodMemory | None:
        """Return what the method holds in memory; None if it quantizes nothing."""
        if not self.quantizes:
            return None
        return MethodMemory(
            hessian=self.keeps_hessian,
            chunks_experts=self.takes_chunks(),
            together=not self.sequential,
            block_copies=self.block_copies,
        )

    def work(self) -> Work:
        """Return the computing that the method takes with its calibration windows."""
        return Work(solves=self.keeps_hessian)


@dataclass
class NoneSettings(MethodSettings):
    name: str = "none"
    implementation: ClassVar[str] = ""
    appearance: ClassVar[Appearance] = Appearance("FP16", row=0)
    quantizes: ClassVar[bool] = False


@dataclass
class RtnSettings(MethodSettings):
    name: str = "rtn"
    mse: bool = False
    implementation: ClassVar[str] = "q3q.quantize.methods.rtn:Rtn"
    formats: ClassVar[tuple[str, ...]] = FORMATS
    keeps_hessian: ClassVar[bool] = False
    appearance: ClassVar[Appearance] = Appearance("RTN", row=1, colour=0, yardstick=True)


@dataclass
class GptqSettings(MethodSettings):
    name: str = "gptq"
    damping: float = 0.01
    block_size: int = 128
    act_order: bool = True
    true_sequential: bool = True
    static_groups: bool = False
    mse: bool = False
    version: ClassVar[int] = 3
    implementation: ClassVar[str] = "q3q.quantize.methods.gptq:Gptq"
    formats: ClassVar[tuple[str, ...]] = FORMATS
    block_copies: ClassVar[float] = 1.5
    appearance: ClassVar[Appearance] = Appearance("GPTQ", row=3, colour=1)

    def observes(self) -> bool:
        return True

    def knobs(self, scheme: Scheme | None) -> Json:
        """Return the knobs, without static_groups where the format's groups are always static."""
        knobs = super().knobs(scheme)
        if scheme is not None and scheme.own_groups:
            del knobs["static_groups"]
        return knobs

    @property
    def sequential(self) -> bool:  # type: ignore[override]
        return self.true_sequential

    def work(self) -> Work:
        return Work(passes=1 if self.true_sequential else 2, solves=True)

    def problem(self) -> str | None:
        if not 0 < self.damping <= 1:
            return (
                f"method.damping={self.damping}: give a share of the mean Hessian diagonal, above "
                "0 and at most 1"
            )
        if self.block_size < 1:
            return f"method.block_size={self.block_size}: give a positive number of columns"
        return None


@dataclass
class AwqSettings(MethodSettings):
    name: str = "awq"
    scale: bool = True
    clip: bool = True
    grid: int = 20
    v_to_o: bool = False
    race: bool = True
    version: ClassVar[int] = 4
    implementation: ClassVar[str] = "q3q.quantize.methods.awq:Awq"
    formats: ClassVar[tuple[str, ...]] = FORMATS
    appearance: ClassVar[Appearance] = Appearance("AWQ", row=2, colour=2)
    rebalances: ClassVar[bool] = True
    chunks_experts: ClassVar[bool | None] = True
    inputs_held: ClassVar[int] = 5
    default_length: ClassVar[int] = 512
    default_draw: ClassVar[str] = "documents"

    def observes(self) -> bool:
        return True

    def work(self) -> Work:
        # Measured: a search of 20 candidates is worth 8 to 20 passes with the race; without it
        # about 20 instead of 8 of them run to their end.
        return Work(passes=1 + 14 * self.grid / 20 * (1 if self.race else 2))

    def problem(self) -> str | None:
        if self.grid < 1:
            return f"method.grid={self.grid}: give the number of scale exponents to try, 1 or more"
        return None

    def clash(self, scheme: Scheme) -> str | None:
        if self.clip and scheme.group_rows != 1:
            return (
                f"method.clip=true clips each row's range, and with group_rows={scheme.group_rows} "
                "rows share a scale: give method.clip=false"
            )
        return super().clash(scheme)


@dataclass
class SmoothQuantSettings(MethodSettings):
    name: str = "smoothquant"
    smooth: bool = True
    alpha: float = 0.5
    o_and_down: bool = False
    search: bool = False
    alpha_grid: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    search_windows: int = 8
    version: ClassVar[int] = 2
    implementation: ClassVar[str] = "q3q.quantize.methods.smoothquant:SmoothQuant"
    formats: ClassVar[tuple[str, ...]] = FORMATS
    appearance: ClassVar[Appearance] = Appearance("SmoothQuant", row=4, colour=3)
    rebalances: ClassVar[bool] = True
    chunks_experts: ClassVar[bool | None] = True
    keeps_hessian: ClassVar[bool] = False
    default_bits: ClassVar[int] = 8
    default_group_size: ClassVar[int] = -1
    default_symmetric: ClassVar[bool] = True
    default_act_bits: ClassVar[int | None] = 8
    default_samples: ClassVar[int] = 512
    default_length: ClassVar[int] = 512
    default_draw: ClassVar[str] = "documents"

    def observes(self) -> bool:
        return self.smooth

    def work(self) -> Work:
        variants = len(self.alpha_grid) if self.search else 0
        return Work(passes=2, variants=variants, variant_windows=self.search_windows)

    def problem(self) -> str | None:
        for name, alphas in (("alpha", [self.alpha]), ("alpha_grid", self.alpha_grid)):
            wrong = [alpha for alpha in alphas if not 0 <= alpha <= 1]
            if wrong:
                return (
                    f"method.{name} has {wrong[0]}: give the share of each channel's range to "
                    "move, 0 to 1"
                )
        if self.search and not self.smooth:
            return (
                "method.search=true searches for alpha, and method.smooth=false uses none: drop "
                "one of them"
            )
        if self.search and not self.alpha_grid:
            return "method.alpha_grid=[]: give the alphas to search among"
        if self.search_windows < 1:
            return (
                f"method.search_windows={self.search_windows}: give 1 or more calibration windows "
                "to search on"
            )
        return None

    def clash(self, scheme: Scheme) -> str | None:
        if not scheme.symmetric and scheme.format in BLOCKS:
            taken = [
                name for name in self.formats if name not in BLOCKS or not BLOCKS[name].offsets
            ]
            return (
                f"method={self.name} rounds to grids that are symmetric around zero, and "
                f"format={scheme.format} has offsets; it takes format={','.join(taken)}"
            )
        if not scheme.symmetric:
            return (
                f"method={self.name} rounds to grids that are symmetric around zero, so "
                "symmetric=false makes no sense; method=rtn rounds asymmetrically, with act_bits "
                "too"
            )
        return super().clash(scheme)

    def knobs(self, scheme: Scheme | None) -> Json:
        """Return the knobs, and act_bits where alpha is searched: no other method's weights depend
        on how activations will be quantized.
        """
        if not self.smooth:
            return {"name": self.name, "smooth": False}
        knobs = super().knobs(scheme)
        for unread in ("alpha",) if self.search else ("alpha_grid", "search_windows"):
            del knobs[unread]
        if self.search and scheme:
            stored = scheme.to_json()
            acts = ("act_bits", "act_format", "act_group_size")
            knobs |= {key: stored[key] for key in acts if key in stored}
        return knobs


@dataclass
class BillmSettings(MethodSettings):
    name: str = "billm"
    damping: float = 0.01
    salient_metric: str = "hessian"
    version: ClassVar[int] = 2
    implementation: ClassVar[str] = "q3q.quantize.methods.billm:Billm"
    appearance: ClassVar[Appearance] = Appearance("BiLLM", row=5, colour=4)
    bits: ClassVar[tuple[int, ...]] = (1,)
    default_bits: ClassVar[int] = 1

    def observes(self) -> bool:
        return True

    def work(self) -> Work:
        return Work(solves=True, weight_operations=45_000)  # measured on the demo models

    def problem(self) -> str | None:
        if not 0 < self.damping <= 1:
            return (
                f"method.damping={self.damping}: give a share of the mean Hessian diagonal, above "
                "0 and at most 1"
            )
        if self.salient_metric not in ("hessian", "magnitude"):
            return (
                f"method.salient_metric={self.salient_metric} is not known; choose from: hessian, "
                "magnitude"
            )
        return None

    def clash(self, scheme: Scheme) -> str | None:
        if (problem := super().clash(scheme)) is not None:
            return problem
        if scheme.group_size < 2:
            return (
                f"method={self.name} binarizes blocks of group_size columns, so "
                f"group_size={scheme.group_size} makes no sense; give 2 or more (128 in the paper)"
            )
        if scheme.symmetric:
            return (
                f"method={self.name} binarizes around each group's mean, so symmetric=true makes "
                "no sense"
            )
        return None


SETTINGS: dict[str, type[MethodSettings]] = {
    "none": NoneSettings,
    "rtn": RtnSettings,
    "gptq": GptqSettings,
    "awq": AwqSettings,
    "smoothquant": SmoothQuantSettings,
    "billm": BillmSettings,
}
