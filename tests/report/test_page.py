"""Names that people choose are text in the page, whatever they contain."""

from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

from q3q.record import COMPLETED, SiteError, TrialRecord
from q3q.report.about import About
from q3q.report.write import one_format
from q3q.spec import Evaluation, MethodRef, ModelRef, Scheme, TaskRef, TextRef, TrialSpec

# Names this long leave a heatmap no room.
pytestmark = pytest.mark.filterwarnings("ignore:constrained_layout not applied")
HOSTILE = """<script>alert("x")</script>'"><img src=x onerror='y'>{{ 7*7 }}{% raw %} id="z" &amp;"""


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def record(hostile: str, method: str, perplexity: float | None, bits: int = 4) -> TrialRecord:
    text, task = f"text {hostile}", f"task {hostile}"
    spec = TrialSpec(
        model=ModelRef(name=f"8 {hostile}", digest="d", dtype="float32"),
        method=MethodRef(name=method, version=1, knobs={"knob": f"knob {hostile}"}),
        scheme=None if method == "none" else Scheme(bits=bits, group_size=128, symmetric=False),
        calibration=None,
        evaluation=Evaluation(
            texts=(TextRef(name=text, digest="d", window=8),), tasks=(TaskRef(name=task),)
        ),
        seed=0,
    )
    metric = f"perplexity/{text}"
    metrics = {f"{task}/acc": 0.5, f"kl/{text}": 0.1, "model_bytes": 1e6 * bits}
    return TrialRecord(
        spec=spec,
        status=COMPLETED,
        metrics=metrics | ({} if perplexity is None else {metric: perplexity}),
        diverged=() if perplexity is not None else (metric,),
        sites=(
            SiteError(
                block=0,
                site=f"site {hostile}",
                linear=f"linear {hostile}",
                weight_error=0.1,
                output_error=None,
            ),
        ),
        environment={"git_commit": f"commit {hostile}"},
    )


@cache
def page(hostile: str) -> Page:
    foreign = f"method {hostile}".replace(" ", "_")
    records = [
        record(hostile, "none", 2.0, 16),
        record(hostile, foreign, 3.0),
        record(hostile, foreign, None, 3),
        record(hostile, "rtn", 3.5),
        TrialRecord.failed(record(hostile, "gptq", None).trial, f"reason {hostile}"),
    ]
    words: dict[str, Any] = {
        key: f"{key} {hostile}" for key in ("name", "command", "question", "expectation")
    }
    about = About(**words, warnings=[f"warning {hostile}"])
    return Page(one_format(records, about, "html").decode())


def test_no_name_becomes_markup() -> None:
    hostile = page(HOSTILE)
    assert hostile.tags.count("script") == 1
    assert "img" not in hostile.tags
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]


@pytest.mark.parametrize(
    "word",
    ["name", "command", "question", "expectation", "warning", "8", "text", "task", "reason"],
)
def test_names_are_shown_as_they_are(word: str) -> None:
    assert f"{word} {HOSTILE}" in page(HOSTILE).text


def test_attributes_hold_names_as_they_are() -> None:
    values: Any = [value for _, value in page(HOSTILE).attributes]
    foreign = f"method {HOSTILE}".replace(" ", "_")
    assert any(value.startswith(f"{foreign}, 4 bits: ") for value in values)
    assert f"perplexity, text {HOSTILE}" in values


def test_a_dollar_is_no_formula() -> None:
    """Matplotlib would read what stands between two of them as mathematics, or fail."""
    assert "8 a$\\frac{$b" in page("a$\\frac{$b").text
