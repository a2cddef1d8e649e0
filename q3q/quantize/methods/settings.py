"""Each method's knobs: the dataclass *is* its config. No torch here, so that --help and completion start fast."""

from dataclasses import asdict, dataclass, field
from typing import ClassVar

from q3q.spec import Json, Scheme


@dataclass
class MethodSettings:
    """What every method's settings say of themselves.

    version: goes up when a change can change the numbers, so that a mended bug is not served stale.
    implementation: `module:Class` of its Method.
    bits, default_*: what the method can take, and what null means for it (default_act_bits None: 16-bit activations).
    rebalances: it shifts scale to all linears of a site at once, which must then share one scheme.
    """

    name: str = "???"

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = ""
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
    quantizes: ClassVar[bool] = True
    rebalances: ClassVar[bool] = False
    default_bits: ClassVar[int] = 4
    default_group_size: ClassVar[int] = 128
    default_symmetric: ClassVar[bool] = False
    default_act_bits: ClassVar[int | None] = None
    default_samples: ClassVar[int] = 128
    default_length: ClassVar[int] = 2048
    default_draw: ClassVar[str] = "random"

    def problem(self) -> str | None:
        """What is wrong with the knobs, in one line, or None."""
        return None

    def clash(self, scheme: Scheme) -> str | None:
        """Why this method makes no sense with this scheme, each valid by itself, in one line; or None."""
        if scheme.bits in self.bits:
            return None
        able = f"{min(self.bits)} to {max(self.bits)}" if len(self.bits) > 1 else str(self.bits[0])
        return f"method={self.name} cannot do bits={scheme.bits}; it takes {able}"

    def observes(self) -> bool:
        """Whether, with these knobs, the method reads calibration text."""
        return False

    def knobs(self, scheme: Scheme | None) -> Json:
        """What a trial's spec says of the method: its knobs, but for those that have no effect."""
        return asdict(self)


@dataclass
class NoneSettings(MethodSettings):
    name: str = "none"
    implementation: ClassVar[str] = ""
    quantizes: ClassVar[bool] = False


@dataclass
class RtnSettings(MethodSettings):
    name: str = "rtn"
    mse: bool = False
    implementation: ClassVar[str] = "q3q.quantize.methods.rtn:Rtn"


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

    def observes(self) -> bool:
        return True

    def problem(self) -> str | None:
        if not 0 < self.damping <= 1:
            return f"method.damping={self.damping}: give a share of the mean Hessian diagonal, above 0 and at most 1"
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
    rebalances: ClassVar[bool] = True
    default_length: ClassVar[int] = 512
    default_draw: ClassVar[str] = "documents"

    def observes(self) -> bool:
        return True

    def problem(self) -> str | None:
        if self.grid < 1:
            return f"method.grid={self.grid}: give the number of scale exponents to try, 1 or more"
        return None


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
    rebalances: ClassVar[bool] = True
    default_bits: ClassVar[int] = 8
    default_group_size: ClassVar[int] = -1
    default_symmetric: ClassVar[bool] = True
    default_act_bits: ClassVar[int | None] = 8
    default_samples: ClassVar[int] = 512
    default_length: ClassVar[int] = 512
    default_draw: ClassVar[str] = "documents"

    def observes(self) -> bool:
        return self.smooth

    def problem(self) -> str | None:
        for name, alphas in (("alpha", [self.alpha]), ("alpha_grid", self.alpha_grid)):
            wrong = [alpha for alpha in alphas if not 0 <= alpha <= 1]
            if wrong:
                return f"method.{name} has {wrong[0]}: give the share of each channel's range to move, 0 to 1"
        if self.search and not self.smooth:
            return "method.search=true searches for alpha, and method.smooth=false uses none: drop one of them"
        if self.search and not self.alpha_grid:
            return "method.alpha_grid=[]: give the alphas to search among"
        if self.search_windows < 1:
            return f"method.search_windows={self.search_windows}: give 1 or more calibration windows to search on"
        return None

    def clash(self, scheme: Scheme) -> str | None:
        if not scheme.symmetric:
            return (
                f"method={self.name} rounds to grids that are symmetric around zero, so symmetric=false makes no "
                "sense; method=rtn rounds asymmetrically, with act_bits too"
            )
        return super().clash(scheme)

    def knobs(self, scheme: Scheme | None) -> Json:
        """A searched alpha depends on how activations will be quantized, which no other method's weights do."""
        if not self.smooth:
            return {"name": self.name, "smooth": False}
        knobs = super().knobs(scheme)
        for unread in ("alpha",) if self.search else ("alpha_grid", "search_windows"):
            del knobs[unread]
        return knobs | ({"act_bits": scheme.act_bits} if self.search and scheme else {})


@dataclass
class BillmSettings(MethodSettings):
    name: str = "billm"
    damping: float = 0.01
    salient_metric: str = "hessian"
    version: ClassVar[int] = 2
    implementation: ClassVar[str] = "q3q.quantize.methods.billm:Billm"
    bits: ClassVar[tuple[int, ...]] = (1,)
    default_bits: ClassVar[int] = 1

    def observes(self) -> bool:
        return True

    def problem(self) -> str | None:
        if not 0 < self.damping <= 1:
            return f"method.damping={self.damping}: give a share of the mean Hessian diagonal, above 0 and at most 1"
        if self.salient_metric not in ("hessian", "magnitude"):
            return f"method.salient_metric={self.salient_metric} is not known; choose from: hessian, magnitude"
        return None

    def clash(self, scheme: Scheme) -> str | None:
        if scheme.bits not in self.bits:
            return super().clash(scheme)
        if scheme.group_size < 2:
            return (
                f"method={self.name} binarizes blocks of group_size columns, so group_size={scheme.group_size} makes "
                "no sense; give 2 or more (128 in the paper)"
            )
        if scheme.symmetric:
            return f"method={self.name} binarizes around each group's mean, so symmetric=true makes no sense"
        return None


SETTINGS: dict[str, type[MethodSettings]] = {
    "none": NoneSettings,
    "rtn": RtnSettings,
    "gptq": GptqSettings,
    "awq": AwqSettings,
    "smoothquant": SmoothQuantSettings,
    "billm": BillmSettings,
}
