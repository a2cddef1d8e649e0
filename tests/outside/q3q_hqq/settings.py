from dataclasses import dataclass
from typing import ClassVar

from q3q.quantize.methods.settings import MethodSettings


@dataclass
class HqqSettings(MethodSettings):
    """HQQ's knobs, with the paper's defaults.

    p: of the norm, below 1
    beta, kappa: of the penalty, and its growth
    steps: of the alternation at most
    """

    name: str = "hqq"
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20
    implementation: ClassVar[str] = "q3q_hqq.method:Hqq"
    keeps_hessian: ClassVar[bool] = False
    whole_zeros: ClassVar[bool] = False
    default_group_size: ClassVar[int] = 64


@dataclass
class SilentSettings(HqqSettings):
    """HQQ's, without a word about its zero points."""

    name: str = "silent"
    whole_zeros: ClassVar[bool] = True
