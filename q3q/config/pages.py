"""The pages of conf/: their names, their first lines, and the Hub's names of their models."""

import functools
import re
from pathlib import Path

from omegaconf import OmegaConf

from q3q.quantize.methods.registry import offers

CONF = Path(__file__).parents[2] / "conf"
# Groups that a person chooses from, in the order of their importance.
CHOICES = ("model", "method", "calibration", "evaluation", "export", "cluster", "study", "track")


@functools.cache
def pages(group: str) -> dict[str, str]:
    """Return each page of a group, and the sentence that its file begins with.

    A method of another package has its package in the sentence's place.
    """
    sentences = {path.stem: _first_sentence(path) for path in sorted((CONF / group).glob("*.yaml"))}
    if group == "method":
        sentences |= {
            name: offer.package for name, offer in offers().items() if name not in sentences
        }
    return sentences


@functools.cache
def hub_sources() -> dict[str, str]:
    """Return the Hub's name of each model that conf/ has a page for, by page."""
    sources = {
        path.stem: OmegaConf.select(OmegaConf.load(path), "source")
        for path in sorted((CONF / "model").glob("*.yaml"))
    }
    return {page: str(source) for page, source in sources.items() if source is not None}


@functools.cache
def default_page(group: str) -> str:
    """Return the page that is taken where none is asked for."""
    defaults = OmegaConf.select(OmegaConf.load(CONF / "config.yaml"), "defaults")
    return next(
        str(entry[group]) for entry in defaults if not isinstance(entry, str) and group in entry
    )


def page_of(source: str) -> str | None:
    """Return the page of a Hub model, if conf/ has one."""
    own = (page for page, name in hub_sources().items() if name.lower() == source.lower())
    return next(own, None)


def _first_sentence(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = []
    for line in lines:
        if line.startswith("# @package"):
            continue
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return re.split(r"(?<=\.)\s+(?=[A-Z])", " ".join(comment), maxsplit=1)[0]
