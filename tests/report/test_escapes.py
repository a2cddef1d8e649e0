"""Names that people choose stay text in LaTeX, Markdown, CSV and on a terminal."""

import csv
import io
import re
from functools import cache
from html.parser import HTMLParser
from typing import Any

import pytest

from q3q.record import COMPLETED, SiteError, TrialRecord
from q3q.report.about import About
from q3q.report.escapes import csv_cell, latex_text, markdown_text
from q3q.report.tables import result_tables, sites_csv
from q3q.report.write import one_format
from q3q.spec import Evaluation, MethodRef, ModelRef, Scheme, TaskRef, TextRef, TrialSpec

HOSTILE = [
    r"\input{/etc/passwd}",
    r"\write18{rm -rf /}",
    r"a\\b",
    r"}\end{tabular}\input{x}",
    "100%_&#$^~{}",
    "$\\frac{1}{0}$",
    "[10pt] starred*",
    "a--b---c",
    "line\nbreak\r\nand\ttab\x1b[2J",
    "=HYPERLINK(1)",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "＝1+1",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "[click](javascript:alert(1))",
    "![x](javascript:alert(1))",
    "[ref][a] and [b]: javascript:x",
    "<javascript:alert(1)>",
    "a | b || c",
    "`code` ``more`` ```",
    "*bold* _em_ __strong__ ~~gone~~",
    "&lt;script&gt; &#60;",
    "# heading\n- item\n> quote",
    "quote \" and ' and `",
]
COMMANDS = {
    *r"\% \_ \& \# \$ \{ \} \\ \usepackage \begin \end \caption \centering \small".split(),
    *r"\toprule \midrule \bottomrule \downarrow \uparrow \pm \textbackslash".split(),
    *r"\textasciicircum \textasciitilde \textless \textgreater \textbar".split(),
    *r"\textquotedbl \textasciigrave".split(),
}


def record(name: str, method: str, perplexity: float) -> TrialRecord:
    spec = TrialSpec(
        model=ModelRef(name=name, digest="d", dtype="float32"),
        method=MethodRef(name=method, version=1, knobs={"knob": name}),
        scheme=None if method == "none" else Scheme(bits=4, group_size=128, symmetric=False),
        calibration=None,
        evaluation=Evaluation(
            texts=(TextRef(name=name, digest="d", window=8),), tasks=(TaskRef(name=name),)
        ),
        seed=0,
    )
    return TrialRecord(
        spec=spec,
        status=COMPLETED,
        metrics={f"perplexity/{name}": perplexity, f"{name}/acc": 0.5},
        sites=(SiteError(block=0, site=name, linear=name, weight_error=-0.1, output_error=None),),
        environment={"git_commit": name, "hardware": {"processor": name}},
    )


@cache
def formats(name: str) -> dict[str, str]:
    """Return a report's formats in which every name that a user can choose is this one."""
    records = [record(name, "none", 2.0), record(name, "rtn", 3.0)]
    records += [TrialRecord.failed(record(name, "gptq", 1.0).trial, name)]
    words: dict[str, Any] = dict.fromkeys(("name", "command", "question", "expectation"), name)
    about = About(**words, warnings=[name], sweeps={records[1].spec.id: name})
    kinds = ("latex", "md", "csv")
    return {kind: one_format(records, about, kind).decode() for kind in kinds}


@pytest.mark.parametrize("name", HOSTILE)
def test_latex_has_our_commands_alone_and_balanced_groups_and_equal_rows(name: str) -> None:
    text = formats(name)["latex"]
    body = text.partition("\n")[2]  # the first line is our comment
    assert set(re.findall(r"\\(?:[a-zA-Z]+|.)", body, re.DOTALL)) <= COMMANDS
    bare = re.sub(r"\\[^a-zA-Z]", "", body)  # without escaped characters
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert not re.search(r"[%#~\"`<>|]", bare)
    formulas = re.sub(r"\$\\(downarrow|uparrow|pm)\$", "", bare)
    assert "$" not in formulas
    assert "^" not in formulas
    assert "_" not in formulas
    rows = [line for line in bare.splitlines() if " & " in line]
    assert len({row.count("&") for row in rows}) == 1
    # LaTeX takes [...] or * after a row's end for arguments of it, over line breaks too.
    assert not re.search(r"\\\\\s*[\[*]", body)


class Tags(HTMLParser):
    def __init__(self, source: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append(tag)


def without_code(markdown: str) -> str:
    """Return Markdown without its blocks and spans of code, as CommonMark delimits them."""
    markdown = re.sub(r"(?ms)^(`{3,})\n.*?\n\1$", "", markdown)
    return re.sub(r"(?<![\\`])(`+)(?!`).+?(?<!`)\1(?!`)", "", markdown)


@pytest.mark.parametrize("name", HOSTILE)
def test_markdown_has_no_html_no_links_and_equal_rows(name: str) -> None:
    text = without_code(formats(name)["md"])
    assert Tags(text).found == []
    links = re.findall(r"(?<!\\)\](?:\(([^)]*)\)|\[|:)", text)
    assert all(link.startswith("plots/") for link in links)
    # A row of a table is one line, and has as many borders as the others of its table.
    for table in re.findall(r"(?m)(?:^\|.*\n)+", text):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1
    headings = [line.lstrip("# ") for line in re.findall(r"(?m)^#+ .*$", text)][1:]
    best, run = "The best method at each bit width", "How it was run"
    assert headings == ["Answer", best, run, "Results", "Failed", "Trials"]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_cell_of_a_csv_begins_a_formula_and_numbers_are_numbers(name: str) -> None:
    site = sites_csv(record(name, "rtn", 2.0))
    for text in (formats(name)["csv"], site):
        rows = list(csv.reader(io.StringIO(text, newline="")))
        assert len({len(row) for row in rows}) == 1
        for cell in (cell for row in rows for cell in row):
            risky = cell.lstrip()[:1] in tuple("=+-@＝＋－＠") or cell[:1] in tuple("\t\r\n")
            assert not risky or not cell.strip() or float(cell) or float(cell) == 0
    assert ",-0.1," in site


@pytest.mark.parametrize("name", HOSTILE)
def test_a_terminal_gets_no_control_characters(name: str) -> None:
    for table in result_tables([record(name, "rtn", 2.0)], everything=True):
        assert all(character.isprintable() or character == "\n" for character in table.plain())


@pytest.mark.parametrize(
    "number", ["-0.5", "+1.2 %", "-3.4 points", "+0.3 decades", "-", "1e-05", "-1,234 %", ""]
)
def test_numbers_and_absent_cells_stay_as_they_are(number: str) -> None:
    assert csv_cell(number) == number
    assert csv_cell(-0.5) == -0.5


def test_ordinary_names_are_readable() -> None:
    assert markdown_text("gptq g64 stories_who [3.1, 3.9]") == "gptq g64 stories_who [3.1, 3.9]"
    assert latex_text("Qwen3-8B-Base") == "Qwen3-8B-Base"
    assert latex_text(r"\{}^~") == (r"\textbackslash{}\{\}\textasciicircum{}\textasciitilde{}")
