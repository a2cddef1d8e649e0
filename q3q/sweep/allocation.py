"""What a trial is given of a machine, and what else it could be given."""

from dataclasses import dataclass

from q3q.placement import Grant


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What a trial gets; of a gang, what each rank gets.

    memory: bytes of main memory that it reserves
    needs: bytes that it is predicted to take where its model lies, in main memory or a GPU's
    room: bytes that it may take there, more than `needs` for activations; None if unknown
    pinned: bytes of `memory` for activations that its GPU does not hold
    kind: of GPU that it must run on, because it does not fit on the others; "" for any
    """

    cpus: float
    gpus: float
    memory: int
    needs: int
    room: int | None = None
    pinned: int = 0
    loader: str = "resident"
    ranks: int = 1
    kind: str = ""

    def __str__(self) -> str:
        if self.gpus:
            count = self.gpus * self.ranks
            return f"{count:g} {self.kind or 'GPU'}{'s' if count > 1 and not self.kind else ''}"
        gang = f"{self.ranks} x " if self.ranks > 1 else ""
        return f"{gang}{self.cpus:g} CPU{'s' if self.cpus > 1 else ''}"

    def grant(self) -> Grant:
        """Return the part of it that the trial's placement holds."""
        return Grant(gpus=self.gpus, loader=self.loader, memory=self.room, pinned=self.pinned)

    @property
    def is_share(self) -> bool:
        """True if other trials may have the rest of its GPU."""
        return 0 < self.gpus < 1


@dataclass(frozen=True)
class Choices:
    """What a trial can be given, the least first.

    fitting: all that fits somewhere, in the order in which they are tried
    requested: those of them that are what the user asked for; never empty
    """

    fitting: tuple[Allocation, ...]
    requested: tuple[Allocation, ...]

    @property
    def least(self) -> Allocation:
        return self.requested[0]

    def at_least(self, share: float) -> Allocation:
        """Return the least with this share of a GPU, or the largest share of the same kind."""
        least = self.least
        if not least.is_share:
            return least
        alike = [
            option
            for option in self.requested
            if (option.kind, option.loader, option.ranks) == (least.kind, least.loader, 1)
        ]
        return next((option for option in alike if option.gpus >= share), alike[-1])

    def larger(self, first: Allocation) -> Allocation | None:
        """Return what the trial gets on a second try, if `first` had too little memory.

        It is the next option that has more memory, more ranks or another loader. One GPU that
        streams the model comes before a gang, which may have to wait for GPUs and takes longer.
        """
        later = list(self.fitting[self.fitting.index(first) :])
        if first.ranks == 1:
            later.sort(key=lambda option: option.ranks > 1)
        return next((option for option in later if _has_more(option, first)), None)


def _has_more(option: Allocation, first: Allocation) -> bool:
    """Return True if it gives each rank more memory, has more ranks, or holds less of the model."""
    more = (option.room or option.gpus) > (first.room or first.gpus)
    return more or option.ranks > first.ranks or option.loader != first.loader
