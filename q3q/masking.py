"""Hide passwords and tokens in text that is shown, logged or filed."""

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
SHORTEST = 8  # characters: a shorter secret is likely to be an ordinary word elsewhere
# Ends of the names of environment variables. PWD and OLDPWD are folders; *_PWD is a password.
_SECRET_NAME = re.compile(
    r"(?i)(token|password|passwd|passphrase|secret|credentials?|creds|connection_string|cookie"
    r"|(^|_)(pass|pw|jwt|pat|dsn|bearer)|_pwd"
    r"|(api|access|private|secret|signing|encryption|account|storage|session|master|auth|service)"
    r"_?key)$"
)
_WORDS = r"[\w.-]*(?:password|passwd|secret|api[_-]?key|access[_-]?key|secret[_-]?key|auth_token)"
_RULES = (
    # user:password@ of a URI, even if the password contains an @
    (re.compile(r"(?<=://)[^/\s'\"`]*@"), f"{HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer|authorization:? basic)\s+[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    # password=..., "api_key": "..."; a bare `token` only as token=..., as the word is common here
    (re.compile(rf"(?i)\b({_WORDS}[\"']?\s*[=:]\s*[\"']?)[^\s'\"&,;{{}})]+"), rf"\1{HIDDEN}"),
    (re.compile(r"(?i)\b([\w.-]*token=[\"']?)[^\s'\"&,;{})]+"), rf"\1{HIDDEN}"),
    # pass=..., DB_PASS=..., pw=...; not OLDPWD=, nor a word that only ends so
    (
        re.compile(r"(?i)(?<![a-z0-9])((?:pass|passphrase|pw|pwd)=[\"']?)(?!/)[^\s'\"&,;{})]+"),
        rf"\1{HIDDEN}",
    ),
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
    variables = os.environ if environment is None else environment
    secrets = [value for name, value in variables.items() if _SECRET_NAME.search(name)]
    for value in sorted(secrets, key=len, reverse=True):  # one may be a part of another
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    for pattern, shown in _RULES:
        text = pattern.sub(shown, text)
    return text
