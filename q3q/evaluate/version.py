"""Versions of the code that measures: numbers of different versions belong to different trials."""

from importlib import metadata

from q3q.errors import ConfigError
from q3q.spec import Evaluation

# Raised when texts are cut, prompts are written or answers are scored in another way.
EVALUATION_VERSION = 1


def lm_eval_version() -> str:
    """Return the installed version of lm-eval, whose task files make the prompts."""
    return metadata.version("lm_eval")


def refuse_other_versions(evaluation: Evaluation) -> None:
    """Refuse a trial that was planned on another machine, or before an upgrade, with other code.

    Its numbers would belong to another trial.

    Raises:
        ConfigError: q3q's evaluation or lm-eval has another version here than in the plan.
    """
    versions: list[tuple[str, int | str | None, int | str]] = []
    if evaluation.texts or evaluation.tasks:
        versions.append(("q3q's evaluation", evaluation.version, EVALUATION_VERSION))
    if evaluation.tasks:
        versions.append(("lm-eval", evaluation.lm_eval, lm_eval_version()))
    for name, planned, here in versions:
        if planned != here:
            raise ConfigError(
                f"the trial was planned with {name} {planned}, and this process has {here}; run "
                "the command again"
            )
