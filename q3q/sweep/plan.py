"""Plan a study: which trials run, on what, in what order, and what they are predicted to take.

The plan comes from config.json and arithmetic alone. A trial's resources follow from the bytes that
its model needs (`models/footprint`): a share of a GPU, one GPU, or a gang; main memory, and the
same part of the cores as of the memory, at least one. If that was too little, the trial gets the
next larger allocation (`shares`). Trials share GPUs only if that ends the sweep sooner (`packing`).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from q3q.formatting import bytes_in_words, fixed, in_gb, in_one_unit
from q3q.kv_scheme import CacheShape, KvScheme
from q3q.models.facts import ModelFacts
from q3q.models.footprint import cache_scheme, cache_shape
from q3q.names import own_names
from q3q.number_formats import INT, short_name
from q3q.placement import Trial
from q3q.quantize.budget.sensitivities import SENSING
from q3q.record import TrialRecord
from q3q.spec import Json, TrialSpec
from q3q.sweep.allocation import Allocation, Choices
from q3q.sweep.costs import CostModel, Rate
from q3q.sweep.disk import left_by_each, refuse_full_disk, running_bytes
from q3q.sweep.machines import Machine, ResourceRequest
from q3q.sweep.made import Made, made_for_others, until
from q3q.sweep.packing import Load, Simulation, share_out, simulate
from q3q.sweep.questions import shown_by_questions
from q3q.sweep.shares import activation_bytes, capacity, choices_of, memory_of, state_bytes

HEADINGS = (
    *("trial", "what", "model", "on", "loader", "predicted", "needs", "main memory", "disk"),
    *("disk while it runs", "GPU-hours"),
)


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A trial and its plan.

    allocation: None for a trial that is done
    larger: what it gets on a second try if it runs out of memory
    phases: predicted seconds of each, on a GPU that it has for itself
    idle: of these, those in which its GPU waits for the processor
    gpu_time: part of its GPU's time that it has, in the simulated sweep, while it computes
    basis: of the prediction: `measured`, `rough` or `done`
    disk: bytes that it leaves beside its record, without what trials before it left already
    blocks: bytes on disk that it takes only while it runs
    cache: what a token leaves in the model's cache
    kv: how that is stored; None: in 16 bits
    makes: see `made_for_others`
    """

    trial: Trial
    allocation: Allocation | None
    larger: Allocation | None = None
    phases: Mapping[str, float]
    idle: float = 0.0
    gpu_time: float = 1.0
    basis: str
    disk: int = 0
    blocks: int = 0
    cache: CacheShape | None = None
    kv: KvScheme | None = None
    makes: Mapping[str, str] = field(default_factory=dict)

    @property
    def spec(self) -> TrialSpec:
        return self.trial.spec

    @property
    def done(self) -> bool:
        return self.allocation is None

    @property
    def seconds(self) -> float:
        return self.idle + self._busy / self.gpu_time

    @property
    def _busy(self) -> float:
        return max(0.0, sum(self.phases.values()) - self.idle)

    @property
    def load(self) -> Load:
        """The trial as the simulation sees it."""
        assert self.allocation is not None
        return Load(
            allocation=self.allocation,
            idle=self.idle,
            busy=self._busy,
            blocks=self.blocks,
            makes={name: self._busy_until(phase) for name, phase in self.makes.items()},
        )

    def _busy_until(self, phase: str) -> float:
        seconds = sum(self.phases.get(earlier, 0.0) for earlier in until(phase))
        return max(0.0, seconds - self.idle)

    @property
    def gpu_hours(self) -> float:
        if self.allocation is None:
            return 0.0
        return self.seconds * self.allocation.gpus * self.allocation.ranks / 3600

    def to_json(self, allocation: Allocation | None = None) -> Json:
        """Return what a record keeps of the plan; `allocation`: what the trial had in the end."""
        final = allocation or self.allocation
        assert final is not None
        stretch = self.seconds / (sum(self.phases.values()) or 1.0)
        shared = {"gpu_time": round(self.gpu_time, 3)} if final.is_share else {}
        return {
            "seconds": round(self.seconds, 3),
            "phases": {phase: round(stretch * took, 3) for phase, took in self.phases.items()},
            "memory": final.needs,
            "cpus": final.cpus,
            "gpus": final.gpus,
            "ranks": final.ranks,
            "loader": final.loader,
            **shared,
        }


def plan(
    trials: Sequence[Trial],
    finished: Mapping[str, TrialRecord],
    facts: Mapping[str, ModelFacts],
    *,
    machines: Sequence[Machine],
    request: ResourceRequest,
    model: CostModel,
    fresh: bool = False,
) -> list[Planned]:
    """Return the plan in the order in which trials start, with those that are done last.

    Unquantized models come first, because the others are compared with them; then the longest, so
    that the last trial to end is a short one. Trials that take equally long are ordered by model.
    What trials need only once (`made`) counts for the longest of them, if it is not there already.

    Args:
        fresh: blocks that are there will be deleted, and are made again.

    Raises:
        ConfigError: a trial fits nowhere.
    """
    planned, chosen = list[Planned](), dict[str, Choices]()
    choices: dict[Hashable, Choices] = {}
    for trial in trials:
        shape = facts[trial.id]
        cache, kv = cache_shape(shape), cache_scheme(shape, trial.spec.kv)
        if trial.id in finished:
            done = Planned(
                trial=trial, allocation=None, phases={}, basis="done", cache=cache, kv=kv
            )
            planned.append(done)
            continue
        key = _allocation_key(trial, shape)
        if key not in choices:
            choices[key] = choices_of(trial, shape, machines, request)
        chosen[trial.id] = choices[key]
        allocation = choices[key].at_least(1.0)
        where, loader = rate_of(allocation, machines), allocation.loader
        predicted = model.predict(trial.spec, shape, where, loader=loader, ranks=allocation.ranks)
        planned.append(
            Planned(
                trial=trial,
                allocation=allocation,
                phases=predicted.phases,
                idle=predicted.idle,
                basis="measured" if model.knows(trial.spec, where, loader) else "rough",
                cache=cache,
                kv=kv,
            )
        )
    planned.sort(key=_turn)
    left = [entry for entry in planned if not entry.done]
    ended = planned[len(left) :]
    disks = left_by_each([entry.trial for entry in left], [entry.trial for entry in ended], facts)
    made = Made(fresh)
    for place, (entry, disk) in enumerate(zip(left, disks, strict=True)):
        shape, allocation = facts[entry.trial.id], chosen[entry.trial.id].at_least(1.0)
        todo, prepared = made.add(entry.trial, shape)
        where, loader = rate_of(allocation, machines), allocation.loader
        predicted = model.predict(
            entry.spec, shape, where, loader=loader, ranks=allocation.ranks, todo=todo
        )
        left[place] = replace(
            entry,
            phases=predicted.phases,
            idle=predicted.idle,
            disk=disk + prepared,
            blocks=running_bytes(entry.trial, shape),
            makes=made_for_others(entry.trial),
        )
    left.sort(key=_turn)
    return [*_sharing(left, [chosen[entry.trial.id] for entry in left], machines), *ended]


def _turn(planned: Planned) -> tuple[bool, bool, float, str]:
    """Return what orders trials: see `plan`."""
    spec = planned.spec
    return planned.done, not spec.rounds_nothing, -planned.seconds, spec.model.files


def _sharing(
    planned: Sequence[Planned], choices: Sequence[Choices], machines: Sequence[Machine]
) -> list[Planned]:
    """Give each trial its share of the machines, and the time that it has of a GPU with it."""
    allocations = share_out(choices, [entry.load for entry in planned], machines)
    shared = [
        replace(entry, allocation=allocation, larger=choice.larger(allocation))
        for entry, allocation, choice in zip(planned, allocations, choices, strict=True)
    ]
    if not any(allocation.is_share for allocation in allocations):
        return shared
    runs = simulate([entry.load for entry in shared], machines).runs
    return [
        replace(entry, gpu_time=min(1.0, entry.load.busy / max(run.seconds - entry.idle, 1e-9)))
        if entry.load.allocation.is_share
        else entry
        for entry, run in zip(shared, runs, strict=True)
    ]


def simulated(planned: Sequence[Planned], machines: Sequence[Machine]) -> Simulation:
    """Return the sweep of all trials that are not done."""
    return simulate([entry.load for entry in planned if not entry.done], machines)


def refuse_what_fills_the_disk(
    planned: Sequence[Planned], machines: Sequence[Machine], storage: Path
) -> None:
    """Refuse a plan whose trials need more disk than the storage folder has free.

    Raises:
        ConfigError: it does.
    """
    left = sum(entry.disk for entry in planned)
    refuse_full_disk(storage, left, simulated(planned, machines).blocks)


def _allocation_key(trial: Trial, facts: ModelFacts) -> Hashable:
    """Return all that a trial's allocation depends on, beside machines and request."""
    spec, placement = trial.spec, trial.placement
    return (
        (spec.model.files, spec.model.dtype, spec.heads, bool(spec.generates)),
        (memory_of(spec), activation_bytes(spec, facts), state_bytes(spec, facts)),
        (placement.loader, placement.memory),
    )


def rate_of(allocation: Allocation, machines: Sequence[Machine]) -> Rate:
    """Return where such a trial computes; no name if several kinds of machine could run it.

    On a GPU, as if the trial had it for itself.
    """
    able = [machine for machine in machines if capacity(allocation, machine)]
    names = {machine.name or (machine.kind if allocation.gpus else "") for machine in able}
    name = names.pop() if len(names) == 1 else ""
    if allocation.gpus:
        return Rate(name, True, 1.0)
    return Rate(name, False, allocation.cpus)


def describe(
    planned: Sequence[Planned], *, machines: Sequence[Machine], where: str, storage: Path | str
) -> str:
    """Return the plan for people: a line a trial, and the total."""
    left = [entry for entry in planned if not entry.done]
    if not left:
        which = f"all {len(planned)} trials are" if len(planned) > 1 else "the trial is"
        return (
            f"Nothing to run: {which} finished, in {storage}. The same command without plan=true "
            "shows the results; fresh=true runs everything again."
        )
    names = own_names([entry.spec for entry in planned])
    rows = [HEADINGS, *map(_row, planned, names)]
    rows = [(*row, *more) for row, more in zip(rows, _caches(planned), strict=True)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    sweep = simulated(left, machines)
    disk, hours = sum(entry.disk for entry in left), sum(entry.gpu_hours for entry in left)
    total = [
        f"{len(left)} to run on {where}",
        f"{sweep.at_once} at a time at most",
        f"about {in_one_unit(sweep.seconds)}",
    ]
    total += [f"{fixed(hours, 1)} GPU-hours"] if hours else []
    total += [f"{bytes_in_words(disk)} of disk"] if disk else []
    total += [f"{bytes_in_words(sweep.blocks)} of disk while trials run"] if sweep.blocks else []
    lines.append(f"{', '.join(total)}. State and records: {storage}")
    if sensing := sum(entry.phases.get(SENSING, 0.0) for entry in left):
        lines.append(
            f"This includes {in_one_unit(sensing)} to measure budgets' sensitivities, once for all "
            f"trials that share them; they are kept in {storage}/{SENSING}."
        )
    counting = {budget for entry in left if (budget := entry.spec.budget) and budget.context}
    lines += sorted(f"{budget.words}: {budget.about}." for budget in counting)
    if unlike := unlike_methods([entry.spec for entry in planned]):
        lines.append(unlike)
    lines += shown_by_questions(entry.spec for entry in planned)
    if any(entry.basis != "measured" for entry in left):
        lines.append(
            "Rough: computed without measurements; trials that finish here correct the next plan."
        )
    return "\n".join(lines)


def unlike_methods(specs: Sequence[TrialSpec]) -> str:
    """Say in a line where methods have other activations or groups; nothing if all have the same.

    Each method has its own defaults, so `method=gptq,smoothquant bits=4` asks for two schemes.
    """
    schemes: dict[str, dict[str, None]] = {}
    for spec in specs:
        if (scheme := spec.scheme) is not None:
            whole = scheme.group_size == -1
            group = "a scale per row" if whole else f"groups of {scheme.group_size}"
            bits = f"{scheme.act_bits or 16}-bit"
            acts = bits if scheme.act_format == INT else short_name(scheme.act_format)
            words = f"{acts} activations, {group}"
            schemes.setdefault(spec.method.name, {})[words] = None
    if len({frozenset(words) for words in schemes.values()}) < 2:
        return ""
    alike: dict[str, list[str]] = {}
    for method, kinds in schemes.items():
        alike.setdefault(" or ".join(kinds), []).append(method)
    each = "; ".join(f"{', '.join(methods)}: {words}" for words, methods in alike.items())
    # Where activations follow the format, act_bits= would make them whole numbers.
    floats = any(spec.scheme is not None and spec.scheme.act_format != INT for spec in specs)
    key = "act_format" if floats else "act_bits"
    return (
        f"By default these methods have different schemes ({each}). To compare them with the same "
        f"scheme, set {key}= and group_size=."
    )


def _row(planned: Planned, name: str) -> tuple[str, ...]:
    spec, allocation = planned.spec, planned.allocation
    head = (spec.id, name, spec.model.label)
    if allocation is None:
        return (*head, "done", *[""] * (len(HEADINGS) - 4))
    cores = f" + {allocation.cpus * allocation.ranks:g} CPUs" if allocation.gpus else ""
    return (
        *head,
        f"{allocation}{cores}",
        allocation.loader,
        f"{in_one_unit(planned.seconds)}{'' if planned.basis == 'measured' else ' (rough)'}",
        in_gb(allocation.needs),
        in_gb(allocation.memory * allocation.ranks),
        bytes_in_words(planned.disk) if planned.disk else "-",
        bytes_in_words(planned.blocks) if planned.blocks else "-",
        fixed(planned.gpu_hours, 2) if allocation.gpus else "-",
    )


def _caches(planned: Sequence[Planned]) -> list[tuple[str, ...]]:
    """Return the heads and cells of columns on the cache; empty ones where nobody asked for any.

    With a context, these are the bytes of one text of so many tokens.
    """
    contexts = [entry.trial.placement.context for entry in planned]
    context = next((tokens for tokens in contexts if tokens is not None), None)
    if context is None and not any(entry.kv for entry in planned):
        return [()] * (1 + len(planned))
    heads = ["cache a token", *([f"cache of {context} tokens"] if context else [])]
    rows = [tuple(heads)]
    for entry in planned:
        shape, kv = entry.cache, entry.kv
        cells = ["" for _ in heads]
        if shape is not None:
            cells[0] = f"{shape.token_bytes(kv):,.0f} bytes"
            cells[1:] = [bytes_in_words(shape.bytes_at(kv, context))] if context else []
        rows.append(tuple(cells))
    return rows
