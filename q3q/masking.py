"""Hide passwords and tokens in text that is shown, logged or filed."""

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
SHORTEST = 8  # characters: a shorter secret is likely to be an ordinary word elsewhere
_SECRET_NAME = re.compile(
    r"(?i)(token|password|passwd|secret|api_?key|access_key|private_key|credentials)$"
)
_WORDS = r"[\w.-]*(?:password|passwd|secret|api[_-]?key|access[_-]?key|secret[_-]?key|auth_token)"
_RULES = (
    # user:password@ of a URI, even if the password contains an @
    (re.compile(r"(?<=://)[^/\s'\"`]*@"), f"{HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer|authorization:? basic)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    # password=..., "api_key": "..."; a bare `token` only as token=..., as the word is common here
    (re.compile(rf"(?i)\b({_WORDS}[\"']?\s*[=:]\s*[\"']?)[^\s'\"&,;{{}})]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b([\w.-]*token=[\"']?)[^\s'\"&,;{})]+"), rf"\1{HIDDEN}"),
    (
        re.compile(r"(?i)([?&](?:sig|signature|x-amz-signature|x-amz-credential|key)=)[^\s'\"&]+"),
        rf"\1{HIDDEN}",
    ),
    # tokens with a known prefix: Hugging Face's, GitHub's, AWS's
    (re.compile(r"\b(?:hf_|gh[pousr]_|github_pat_)\w{16,}|\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"), HIDDEN),
)


def masked(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace by *** whatever looks like a secret.

    That is passwords in URIs, `password=...`, tokens of known form, and the value of each
    environment variable that is named like a secret.

    >>> masked("track.uri=http://ada:lovelace@tracker:5000 and gptq at 4 bits")
    'track.uri=http://***@tracker:5000 and gptq at 4 bits'
    """
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= SHORTEST and _SECRET_NAME.search(name):
            text = text.replace(value, HIDDEN)
    for pattern, shown in _RULES:
        text = pattern.sub(shown, text)
    return text
