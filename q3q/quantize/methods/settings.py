"""Each method's knobs: the dataclass *is* its config. No torch here, so that --help and completion start fast."""

from dataclasses import dataclass
from typing import Any, ClassVar

from q3q.spec import Scheme


@dataclass
class MethodSettings:
    """What every method's settings say of themselves.

    version: goes up when a change can change the numbers, so that a mended bug is not served stale.
    bits, default_*: what the method can take, and what null means for it (default_act_bits None: 16-bit activations).
    """

    name: str = "???"

    version: ClassVar[int] = 1
    implementation: ClassVar[str] = ""  # module:class
    bits: ClassVar[tuple[int, ...]] = (2, 3, 4, 5, 6, 7, 8)
    quantizes: ClassVar[bool] = True
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
    implementation: ClassVar[str] = "q3q.quantize.methods.awq:Awq"
    default_length: ClassVar[int] = 512
    default_draw: ClassVar[str] = "documents"

    def observes(self) -> bool:
        return True

    def problem(self) -> str | None:
        if self.grid < 1:
            return f"method.grid={self.grid}: give the number of scale exponents to try, 1 or more"
        return None


SETTINGS: dict[str, type[MethodSettings]] = {
    "none": NoneSettings,
    "rtn": RtnSettings,
    "gptq": GptqSettings,
    "awq": AwqSettings,
}


def settings_of(method: dict[str, Any]) -> MethodSettings:
    """The settings of a spec's method entry."""
    kind = SETTINGS[method["name"]]
    return kind(**{name: value for name, value in method.items() if name != "version"})
