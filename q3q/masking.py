"""Passwords and tokens, kept out of what is shown, logged and filed."""

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
SHORTEST = 8  # characters: an environment variable with fewer is a word that may stand anywhere
_SECRET_NAME = re.compile(
    r"(?i)(token|password|passwd|secret|api_?key|access_key|private_key|credentials)$"
)
_WORDS = r"[\w.-]*(?:password|passwd|secret|api[_-]?key|access[_-]?key|secret[_-]?key|auth_token)"
_RULES = (
    # user:password@ of a URI, also where the password has an @ of its own
    (re.compile(r"(?<=://)[^/\s'\"`]*@"), f"{HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer|authorization:? basic)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    # password=..., "api_key": "...", and of a bare `token` only token=...: much else here is called so
    (re.compile(rf"(?i)\b({_WORDS}[\"']?\s*[=:]\s*[\"']?)[^\s'\"&,;{{}})]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b([\w.-]*token=[\"']?)[^\s'\"&,;{})]+"), rf"\1{HIDDEN}"),
    (
        re.compile(r"(?i)([?&](?:sig|signature|x-amz-signature|x-amz-credential|key)=)[^\s'\"&]+"),
        rf"\1{HIDDEN}",
    ),
    # tokens that say themselves what they are: Hugging Face's, GitHub's, AWS's
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_)\w{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), HIDDEN),
)


def masked(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text with what looks like a secret replaced by ***: passwords in URIs, `password=...`, tokens of known form,
    and the value of each environment variable whose name says that it is one.

    >>> masked("track.uri=http://ada:lovelace@tracker:5000 and gptq at 4 bits")
    'track.uri=http://***@tracker:5000 and gptq at 4 bits'
    """
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= SHORTEST and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    for pattern, shown in _RULES:
        text = pattern.sub(shown, text)
    return text
