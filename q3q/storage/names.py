"""Turn a shown name, such as a study's, into the name of a file."""

import re

from q3q.canonical import sha256

MOST_BYTES = 100  # of a name in UTF-8: a file system takes 255, and ids and endings are added


def file_name(shown: str) -> str:
    """Return the file name that stands for a shown name; it never leads to another folder.

    A name that can be a file's stays as it is. Any other is changed and gets six hex digits of its
    SHA-256, so that two shown names never share a file.

    >>> file_name("two widths"), file_name("qwen3/first")
    ('two widths', 'qwen3-first-e31507')
    """
    word = re.sub(r"[/\\\x00-\x1f\x7f\ud800-\udfff]", "-", shown).lstrip(".").strip()
    cut = word.encode()[:MOST_BYTES].decode(errors="ignore")
    if cut and cut == shown:
        return cut
    return f"{cut}-{sha256(shown)[:6]}".lstrip("-.")
