"""What a method observes: windows of a text, of several, or of what the model writes itself.

As all of a spec, its JSON is canonical: what is not given is absent, or old ids would change.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from q3q.canonical import without_none

# Sources of calibration that are no text: several of them, and what the model writes itself.
MIX, TRACES = "mix", "traces"
WRITTEN = "written"  # the draw of traces
OWN_TEXT = f"calibration={TRACES}"  # among what has the model generate text


@dataclass(frozen=True, kw_only=True)
class CalibrationPart:
    """One source's windows in a mix; the fields are those of `Calibration`."""

    source: str
    digest: str
    samples: int
    temperature: float | None = None
    prompts: str | None = None

    def to_json(self) -> dict[str, Any]:
        return without_none(asdict(self))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The windows that a method observes: `samples` of `length` tokens of one text, or of a mix.

    digest: of the text; of what traces are written from; of a mix, of its parts
    draw: random, first or documents; of traces, written
    route: experts that see a token, top_k (the router's choice) or all; None for a dense model
    temperature: of the traces that the model writes, 0 for greedy ones; None without traces
    prompts: kind of the text that traces go on from, file or chat; None if from nothing
    parts: of a mix, sorted; none of any other source
    """

    source: str
    digest: str
    samples: int
    length: int
    draw: str
    route: str | None = None
    temperature: float | None = None
    prompts: str | None = None
    parts: tuple[CalibrationPart, ...] = ()

    @property
    def tokens(self) -> int:
        return self.samples * self.length

    @property
    def every_part(self) -> tuple[CalibrationPart, ...]:
        """Its parts; of a single source, that one."""
        whole = CalibrationPart(
            source=self.source,
            digest=self.digest,
            samples=self.samples,
            temperature=self.temperature,
            prompts=self.prompts,
        )
        return self.parts or (whole,)

    @property
    def sources(self) -> tuple[str, ...]:
        """The kinds of text that it has windows of."""
        return tuple(dict.fromkeys(part.source for part in self.every_part))

    @property
    def label(self) -> str:
        """Name it for people: `wikitext2`, or `demo:24+library:8` of a mix."""
        if not self.parts:
            return self.source
        return "+".join(f"{part.source}:{part.samples}" for part in self.parts)

    @property
    def writes(self) -> bool:
        """True if the model writes some of the windows itself."""
        return TRACES in self.sources

    def of_part(self, part: CalibrationPart) -> "Calibration":
        """Return one part of a mix as if it were all."""
        return replace(
            self,
            source=part.source,
            digest=part.digest,
            samples=part.samples,
            draw=WRITTEN if part.source == TRACES else self.draw,
            temperature=part.temperature,
            prompts=part.prompts,
            parts=(),
        )

    def traits(self) -> dict[str, Any]:
        """Return what a name may say of it: its JSON, with a mix's parts as the source."""
        facts = self.to_json() | {"source": self.label}
        facts.pop("parts", None)
        return facts

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self) | {"parts": [part.to_json() for part in self.parts] or None}
        return without_none(facts)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Calibration":
        parts = tuple(CalibrationPart(**part) for part in data.get("parts", ()))
        return cls(**{**data, "parts": parts})
