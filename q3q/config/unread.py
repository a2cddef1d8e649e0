"""Settings that a trial does not read, and why: the user is told before it runs."""

from collections.abc import Iterable, Sequence
from dataclasses import fields

from hydra.core.override_parser.types import Override

from q3q.quantize.methods.registry import settings_class
from q3q.spec import TrialSpec

SCHEME = (
    *("bits", "group_size", "symmetric", "format", "group_rows", "four_over_six"),
    *("overrides", "skip", "budget"),
)
OF_BUDGET = ("unit", "widths", "measure", "samples", "length")
OF_CACHE = ("kv_format", "kv_scales", "kv_group_size", "kv_chunk", "kv_window", "kv_symmetric")
OF_DRIFT = ("evaluation.drift_windows", "evaluation.floor")
OF_TEXTS = ("evaluation.window", "evaluation.drift", *OF_DRIFT)
OF_TASKS = ("evaluation.task_limit", "evaluation.num_fewshot", "evaluation.include_path")


def unread(spec: TrialSpec) -> dict[str, str]:
    """Return the keys that have no effect on this trial, and the reason of each, a main clause.

    A key stands for all keys below it too.
    """
    method, keys = spec.method.name, dict[str, str]()
    if spec.scheme is None:
        keys |= dict.fromkeys(SCHEME, f"method={method} quantizes nothing")
    if spec.scheme is not None and spec.budget is None:
        allots = "no budget is given, so there is nothing to allot"
        keys |= dict.fromkeys((f"budget.{key}" for key in OF_BUDGET), allots)
    if spec.calibration is None and spec.budget is None:
        keys["calibration"] = f"method={method} uses no calibration text with these settings"
    elif spec.calibration is not None and spec.calibration.route is None:
        keys["calibration.route"] = "the model has no experts"
    kind = settings_class(method)
    for knob in fields(kind) if kind is not None else ():
        if knob.name != "name" and knob.name not in spec.method.knobs:
            reason = f"method={method} ignores it because of its other settings"
            keys[f"method.{knob.name}"] = reason
    if "method.static_groups" in keys and spec.scheme is not None and spec.scheme.own_groups:
        reason = f"groups of format={spec.scheme.format} are always static runs of neighbours"
        keys["method.static_groups"] = reason
    if spec.kv is None or not spec.kv.rounds:
        nothing = not (spec.evaluation.texts or spec.evaluation.tasks or spec.export)
        unsaid = "the cache is not rounded"
        reason = "nothing is evaluated" if nothing else unsaid
        keys |= dict.fromkeys(("kv_bits", *OF_CACHE) if nothing else OF_CACHE, reason)
    if not spec.evaluation.texts:
        keys |= dict.fromkeys(OF_TEXTS, "no text is evaluated")
    elif spec.evaluation.drift is None:
        keys |= dict.fromkeys(OF_DRIFT, "evaluation.drift=false measures no divergence")
    if not spec.evaluation.tasks:
        keys |= dict.fromkeys(OF_TASKS, "no task is evaluated")
    return keys


def without_effect(overrides: Sequence[Override], specs: Iterable[TrialSpec]) -> list[str]:
    """Return a line for each reason why overrides have no effect on any of these trials."""
    lacking = [unread(spec) for spec in specs]
    lines: dict[str, list[str]] = {}
    for override in overrides:
        if override.is_delete() or override.value() is None:
            continue
        causes = [_reason(override.key_or_group, keys) for keys in lacking]
        reasons = list(dict.fromkeys(reason for reason in causes if reason is not None))
        if causes and None not in causes:
            lines.setdefault(" and ".join(reasons), []).append(str(override.input_line))
    return [
        f"{' '.join(words)} {'has' if len(words) == 1 else 'have'} no effect: {reason}"
        for reason, words in lines.items()
    ]


def _reason(key: str, keys: dict[str, str]) -> str | None:
    """Return the reason why a key, or the key that it is below, is not read."""
    parts = key.split(".")
    above = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((keys[name] for name in above if name in keys), None)
