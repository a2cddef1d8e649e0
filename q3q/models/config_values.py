"""Values of a config.json, each of the type and within the bounds that make sense."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from q3q.errors import CheckpointError

# Above all that was ever released, and small enough that a plan's arithmetic, which goes from layer
# to layer and from expert to expert, takes no time.
MOST_LAYERS, MOST_EXPERTS, MOST_MATRICES, MOST = 10_000, 10_000, 1_000_000, 2**31
MOST_NUMBER = 1e30  # of those that need not be whole


@dataclass(frozen=True)
class Values:
    """Values of a config.json.

    wrong: makes the error that is raised where one makes no sense
    """

    config: Mapping[str, Any]
    wrong: Callable[[str], CheckpointError]

    def with_defaults(self, defaults: Mapping[str, Any]) -> "Values":
        """Return the values with `defaults` for keys that the file does not have."""
        return replace(self, config={**defaults, **self.config})

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        value = self._given(key, default)
        if type(value) is not int or not 1 <= value <= most:
            bound = "of 1 or more" if type(value) is not int or value < 1 else f"up to {most}"
            raise self._unexpected(key, value, f"a whole number {bound}")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        value = self._given(key, default)
        if type(value) not in (int, float) or not 0 < value <= MOST_NUMBER:
            raise self._unexpected(key, value, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._given(key, default)
        if type(value) is not bool:
            raise self._unexpected(key, value, "true or false")
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        value = self._given(key, {})
        if not isinstance(value, Mapping):
            raise self._unexpected(key, value, "a table")
        return value

    def items(self, key: str) -> list[Any]:
        value = self._given(key, [])
        if not isinstance(value, list):
            raise self._unexpected(key, value, "a list")
        return value

    def _given(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def _unexpected(self, key: str, value: Any, expected: str) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
        return self.wrong(f"config.json gives {key}={shown}; {expected} was expected")
