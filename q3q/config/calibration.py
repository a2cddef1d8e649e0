"""Resolve what a method is calibrated on: one text, a mix of several, or what the model writes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig

from q3q.config.schema import DRAWS, ROUTES, refuse_unknown
from q3q.config.texts import (
    ABSENT,
    absolute,
    chat_template,
    check_long_enough,
    check_path_is_read,
    opened,
)
from q3q.data.chats import refuse_template
from q3q.data.texts import FROM_FILES, SOURCES, Text
from q3q.data.traces import recipe
from q3q.data.windows import CALIBRATION, MIXED
from q3q.errors import CalibrationError, ConfigError
from q3q.formatting import plural
from q3q.models.facts import ModelFacts
from q3q.quantize.methods.settings import MethodSettings
from q3q.spec import MIX, TRACES, WRITTEN, Calibration, CalibrationPart, digest

# Sources of a mix that need no file.
BY_NAME = (*(name for name in SOURCES["calibration"] if name not in FROM_FILES), TRACES)


@dataclass(frozen=True)
class Resolved:
    """A calibration, and its files: the one of a single source, or those of a mix by digest."""

    calibration: Calibration
    file: Path | None = None
    files: Mapping[str, Path] | None = None


@dataclass(frozen=True)
class _Windows:
    """The number of windows to draw from one source, and the file that it reads, if any."""

    part: CalibrationPart
    file: Path | None


def resolve_calibration(
    config: DictConfig, settings: MethodSettings, folder: Path | None, facts: ModelFacts
) -> Resolved:
    """Return what the method observes.

    Args:
        folder: of a local model, for its tokenizer.

    Raises:
        CalibrationError: a text is missing or too short, or the model cannot read it.
        ConfigError: a setting has a value that it cannot have, or is not read.
    """
    calibration = config.calibration
    refuse_unknown("calibration.route", calibration.route, ROUTES)
    samples = settings.default_samples if calibration.samples is None else calibration.samples
    length = settings.default_length if calibration.length is None else calibration.length
    for key, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ConfigError(f"calibration.{key}={value}: give 1 or more")
    scaling = facts.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and length > facts.max_positions:
        raise ConfigError(
            f"calibration.length={length}: this model's rotary frequencies (rope_type=dynamic) "
            f"change in windows of more than {facts.max_positions} tokens, which q3q does not "
            "compute: give a shorter length"
        )
    _refuse_unread(calibration)
    draw = WRITTEN
    if calibration.source != TRACES:
        draw = calibration.draw or settings.default_draw
        refuse_unknown("calibration.draw", draw, DRAWS)
    source = _Source(config, folder, length, draw)
    whole = Calibration(
        source=calibration.source,
        digest="",
        samples=samples,
        length=length,
        draw=draw,
        route=calibration.route if facts.experts else None,
    )
    if calibration.source != MIX:
        windows = source.windows(calibration.source, calibration.path, samples)
        part = windows.part
        own = replace(whole, digest=part.digest, temperature=part.temperature, prompts=part.prompts)
        return Resolved(own, file=windows.file)
    mix = _mixed(source, samples)
    parts = tuple(windows.part for windows in mix)
    files = {windows.part.digest: windows.file for windows in mix if windows.file is not None}
    content = digest({"parts": [part.to_json() for part in parts]})
    return Resolved(replace(whole, digest=content, parts=parts), files=files or None)


def split_source(name: str) -> tuple[str, str | None]:
    """Return the kind of a source and its file: `chat:a.jsonl` is a chat, `a.txt` a file."""
    for kind in FROM_FILES:
        if name.startswith(f"{kind}:"):
            return kind, name.removeprefix(f"{kind}:")
    return "file", name


def counts(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """Divide windows among the sources of a mix, in proportion to their weights.

    Each gets the whole part of its share; those with the largest rests get the windows left over,
    of equal ones the first by name. The counts add up to `samples`, and depend on the weights'
    proportions alone.

    Raises:
        ConfigError: a weight is negative or not finite, all are zero, or a source that has one
            gets no window.
    """
    where = "calibration.mix"
    for name, weight in weights.items():
        if not math.isfinite(weight) or weight < 0:
            raise ConfigError(f"{where}: {name} has the weight {weight:g}: give 0 or more")
    total = math.fsum(weights.values())
    if not total:
        raise ConfigError(f"{where}: the weights sum to zero: give at least one source a weight")
    shares = {name: samples * weight / total for name, weight in weights.items()}
    # A share that is whole but for rounding is whole.
    whole = {name: math.floor(round(share, 9)) for name, share in shares.items()}
    by_rest = sorted(shares, key=lambda name: (round(whole[name] - shares[name], 9), name))
    for name in by_rest[: samples - sum(whole.values())]:
        whole[name] += 1
    for name, weight in weights.items():
        if weight and not whole[name]:
            raise ConfigError(
                f"{where}: of {samples} windows, {name} gets none for its weight {weight:g} of "
                f"{total:g}: give calibration.samples={math.ceil(total / weight)} or more, or "
                "leave it out"
            )
    return {name: count for name, count in whole.items() if count}


def _mixed(source: "_Source", samples: int) -> list[_Windows]:
    """Return the parts of a mix, in an order that does not depend on how they were given."""
    calibration = source.config.calibration
    weights = {str(name): float(weight) for name, weight in calibration.mix.items()}
    if not weights:
        raise ConfigError(
            "calibration=mix needs its sources and their weights: "
            "calibration.mix={wikitext2: 0.5, file:FILE: 0.5}"
        )
    if source.draw == "documents":
        raise ConfigError(
            "calibration.draw=documents does not draw an exact number of windows, which a mix "
            "needs from each source: give calibration.draw=random or first"
        )
    by_digest: dict[str, _Windows] = {}
    for name, count in counts(weights, samples).items():
        kind, path = (name, None) if name in BY_NAME else _of_file(name)
        try:
            windows = source.windows(kind, path, count)
        except CalibrationError as error:
            problem = f"calibration.mix: {name} ({count} of {samples} windows): {error}"
            raise type(error)(problem) from error
        if windows.part.digest in by_digest and windows.part.digest != ABSENT.digest:
            raise ConfigError(f"calibration.mix: {name} is the text of another source of this mix")
        by_digest[windows.part.digest if windows.part.digest != ABSENT.digest else name] = windows
    return sorted(
        by_digest.values(), key=lambda windows: (windows.part.source, windows.part.digest)
    )


def _of_file(name: str) -> tuple[str, str | None]:
    """Return the kind and the file of a mix's source that is no text by name.

    Raises:
        ConfigError: it names no file.
    """
    source, path = split_source(name)
    if path == name or not path:
        kinds = (*BY_NAME, *(f"{kind}:FILE" for kind in FROM_FILES))
        refuse_unknown("calibration.mix", name, kinds)
    return source, path


@dataclass(frozen=True)
class _Source:
    """What all sources of a calibration have in common.

    folder: of a local model, for its tokenizer
    """

    config: DictConfig
    folder: Path | None
    length: int
    draw: str

    def windows(self, source: str, path: str | None, samples: int) -> _Windows:
        """Return windows of one source, which is long enough and which the model can read."""
        if source == TRACES:
            return self._traces(samples)
        text = self._opened(source, path)
        knobs = MIXED if self.config.calibration.source == MIX else CALIBRATION
        check_long_enough(text, self.folder, samples, self.length, self.draw, knobs)
        part = CalibrationPart(source=source, digest=text.digest, samples=samples)
        return _Windows(part, absolute(path))

    def _traces(self, samples: int) -> _Windows:
        calibration = self.config.calibration
        temperature = calibration.temperature
        if temperature is None or not math.isfinite(temperature) or temperature < 0:
            raise ConfigError(
                f"calibration.temperature={temperature}: give 0 (each next token is the likeliest) "
                "or more; 1 is the model's own"
            )
        source: str | None = None
        path: str | None = None
        text: Text | None = None
        if calibration.prompts is not None:
            source, path = split_source(calibration.prompts)
            text = self._opened(source, path)
        prompts = 1 if text is None else len(text.documents)
        if not temperature and prompts < samples:
            raise ConfigError(
                f"calibration.temperature=0: from {plural(prompts, 'beginning')}, {samples} greedy "
                f"traces would repeat each other: give calibration.temperature=1, or "
                f"calibration.prompts=FILE with {samples} prompts or more"
            )
        part = CalibrationPart(
            source=TRACES,
            digest=recipe(text, temperature),
            samples=samples,
            temperature=temperature,
            prompts=source,
        )
        return _Windows(part, absolute(path))

    def _opened(self, source: str, path: str | None) -> Text:
        """Open a text; conversations only where the model has a template for them."""
        text = opened(self.config, source, "calibration", path)
        if text.chat:
            model = self.config.model
            template = chat_template(model.source, model.revision, self.folder)
            refuse_template(template, str(path))
        return text


def _refuse_unread(calibration: DictConfig) -> None:
    """Refuse settings of calibration that its source does not read."""
    source = calibration.source
    check_path_is_read(calibration.path, "calibration", [source])
    writes = source == TRACES or (source == MIX and TRACES in calibration.mix)
    readers = {
        "mix": (bool(calibration.mix), source == MIX, MIX),
        "prompts": (calibration.prompts is not None, writes, TRACES),
        "temperature": (calibration.temperature is not None, writes or source == MIX, TRACES),
        "draw": (source == TRACES and calibration.draw is not None, False, "TEXT"),
    }
    for key, (is_given, is_read, reader) in readers.items():
        if is_given and not is_read:
            raise ConfigError(
                f"calibration.{key} is not read by calibration={source}: it is for "
                f"calibration={reader}"
            )
