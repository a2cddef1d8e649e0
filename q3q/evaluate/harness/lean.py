"""`lm_eval.simple_evaluate` without a report on the machine that nobody reads."""

from typing import Any

from lm_eval import evaluator


def simple_evaluate(**settings: Any) -> dict[str, Any]:
    """Evaluate as lm-eval does, but leave out what it finds out about the machine.

    It lists all packages and asks the drivers, in other processes, for more than a second at each
    call. A trial's record has its own account of the machine.
    """
    report = evaluator.add_env_info
    evaluator.add_env_info = lambda results: None
    try:
        answer: dict[str, Any] = evaluator.simple_evaluate(**settings)
        return answer
    finally:
        evaluator.add_env_info = report
