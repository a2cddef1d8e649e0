"""Write names that people choose into LaTeX, Markdown and CSV, so that each is text and no more.

A page's names are escaped by Jinja, a terminal's by `q3q.formatting.printable`.
"""

import re

from q3q.formatting import printable

LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "`": r"\textasciigrave{}",
    # After the end of a row, LaTeX reads these as arguments of \\.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    **{character: f"\\{character}" for character in "_%&#$"},
}
# What a spreadsheet takes for the beginning of a formula, in both widths.
FORMULA = "=+-@＝＋－＠"
# Numbers, and the signed differences that our own tables hold.
NUMBER = re.compile(r"[+-]?(\d[\d,]*)?\.?\d+([eE][+-]?\d+)?( ?(%|points|decades))?")


def latex_text(text: str) -> str:
    """Return `text` for LaTeX in text mode: no commands, no groups, no formulas."""
    escaped = "".join(LATEX.get(character, character) for character in printable(text))
    return re.sub(r"(?<=-)(?=-)", "{}", escaped)  # no dashes of hyphens


def markdown_text(text: str) -> str:
    """Return one line for Markdown: no HTML, links, emphasis, code, formulas or table borders.

    Underscores within words, and brackets that cannot begin a link, stay as they are: names and
    intervals are full of them.
    """
    # A backslash escapes punctuation alone, which may be what follows this text.
    text = re.sub(r"\\(?=[!-/:-@\[-`{-~]|$)", r"\\\\", printable(text))
    text = re.sub(r"&(?=#?\w+;)", "&amp;", text)
    text = text.replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([`*|~$])", r"\\\1", text)
    text = re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)
    return re.sub(r"\](?=[(\[:])", r"\\]", text)


def markdown_code(text: str) -> str:
    """Return one line of Markdown code, whatever backticks `text` contains."""
    line = printable(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"{fence}{line}{fence}"


def markdown_block(text: str) -> str:
    """Return a block of Markdown code, whatever backticks `text` contains."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}\n{text}\n{fence}"


def csv_cell(content: object) -> object:
    """Return a cell that no spreadsheet runs: text that begins like a formula gets an apostrophe.

    Numbers, and a lone `-` for what is absent, stay as they are.
    """
    if not isinstance(content, str) or content == "-" or NUMBER.fullmatch(content):
        return content
    text = content.replace("\r\n", "\n").replace(
        "\r", "\n"
    )  # a lone \r ends a row for some readers
    begins = text.lstrip()[:1]
    risky = (begins and begins in FORMULA) or text[:1] in ("\t", "\n")
    return f"'{text}" if risky else text
