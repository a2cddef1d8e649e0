"""Resolve calibration and evaluation texts, and check that they are long enough."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from q3q.config.schema import DRAWS, ROUTES, TEXT_NAMES, refuse_unknown
from q3q.data.texts import SOURCES, Text, load_text
from q3q.errors import CalibrationError, ConfigError
from q3q.models.facts import ModelFacts
from q3q.quantize.methods.settings import MethodSettings
from q3q.spec import Json

RANDOM_TEXTS = {"c4": 256}
# No text has tokens so long on average: with more characters than this per token needed, it is long enough.
CHARACTERS_PER_TOKEN = 100


def resolve_calibration(
    config: DictConfig, settings: MethodSettings, folder: Path | None, facts: ModelFacts
) -> Json:
    wanted = config.calibration
    refuse_unknown("calibration.route", wanted.route, ROUTES)
    draw = wanted.draw or settings.default_draw
    refuse_unknown("calibration.draw", draw, DRAWS)
    samples = settings.default_samples if wanted.samples is None else wanted.samples
    length = settings.default_length if wanted.length is None else wanted.length
    for key, value in (("samples", samples), ("length", length)):
        if value < 1:
            raise ConfigError(f"calibration.{key}={value}: give 1 or more")
    check_path_is_read(wanted.path, "calibration", [wanted.source])
    text = open_text(wanted.source, "calibration", wanted.path, config.data.path)
    check_long_enough(text, folder, samples, length, draw)
    drawn = {
        "source": wanted.source,
        "digest": text.digest,
        "samples": samples,
        "length": length,
        "draw": draw,
    }
    return {**drawn, "route": wanted.route} if facts.experts else drawn


def data_folder(config: DictConfig) -> Path | None:
    if config.data.path is None:
        return None
    folder = Path(config.data.path).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(f"data.path={config.data.path} is not a folder")
    return folder


@functools.cache
def check_long_enough(
    text: Text, folder: Path | None, samples: int, length: int, draw: str
) -> None:
    """Draw the windows now if the text may be too short for them, so that no trial starts in vain.

    Raises:
        CalibrationError: it is too short, or has no document of the length asked for.
    """
    needed = length * (samples if draw == "first" else 1)
    if draw != "documents" and sum(map(len, text.documents)) >= CHARACTERS_PER_TOKEN * needed:
        return
    if (
        folder is None
    ):  # a Hub model, whose tokenizer may not be here yet: only what is certain is said
        count = len(text.joined.encode())
        if count < needed:  # a byte-level tokenizer makes at most one token of each byte
            raise CalibrationError(
                f"{text.name} has {count} bytes, so fewer than the {needed} tokens asked for"
            )
        return
    from tokenizers import Tokenizer

    from q3q.data.windows import draw_windows

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    draw_windows(
        text,
        lambda part: tokenizer.encode(part, add_special_tokens=False).ids,
        samples=samples,
        length=length,
        draw=draw,
        seed=0,
    )


def name_of_text(source: str, text: Text) -> str:
    """A text's name in metrics; of a file its own, in the few characters that trackers take.

    Raises:
        ConfigError: a file is called like one of the texts that everyone knows: its numbers would pass for that one's.
    """
    if source != "file":
        return TEXT_NAMES.get(source, source)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", text.name)
    known = [TEXT_NAMES.get(source, source) for source in SOURCES["evaluation"] if source != "file"]
    if name in known:
        raise ConfigError(
            f"evaluation.path: a file called {name} would be taken for q3q's text of that name; rename it"
        )
    return name


def check_path_is_read(path: str | None, split: str, sources: Sequence[str]) -> None:
    if path is not None and "file" not in sources:
        raise ConfigError(
            f"{split}.path={path} is not read by {split}={'+'.join(sources)}: add {split}=file"
        )


@functools.cache
def open_text(source: str, split: Any, path: str | None, data: str | None) -> Text:
    if source == "file" and path is None:
        raise CalibrationError(f"{split}=file needs a text: {split}.path=FILE")
    return load_text(
        source, split=split, path=path, data=None if data is None else Path(data).expanduser()
    )
