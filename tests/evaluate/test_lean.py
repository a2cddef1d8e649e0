"""lm-eval's evaluation without its report on the machine."""

from typing import Any

import pytest
from lm_eval import evaluator

from q3q.evaluate.harness.lean import simple_evaluate


@pytest.mark.parametrize("error", [None, ValueError("no such task")])
def test_the_machine_is_not_asked_and_lm_eval_is_left_as_it_was(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(evaluator, "add_env_info", asked.append)
    report = evaluator.add_env_info

    def evaluate(**settings: Any) -> dict[str, Any]:
        evaluator.add_env_info(settings)
        if error is not None:
            raise error
        return settings

    monkeypatch.setattr(evaluator, "simple_evaluate", evaluate)
    if error is None:
        assert simple_evaluate(limit=3) == {"limit": 3}
    else:
        with pytest.raises(ValueError, match="no such task"):
            simple_evaluate(limit=3)
    assert not asked
    assert evaluator.add_env_info == report
