"""The noise floor: what rounding alone costs a model that is not quantized.

It is the KL divergence of the model from itself, computed in another type. What is nearer to the
model than this cannot be told from it.
"""

from collections.abc import Sequence
from dataclasses import replace

from q3q.config.command import evaluation_words, judged_words
from q3q.placement import Trial
from q3q.quantize.methods.registry import method_ref
from q3q.quantize.methods.settings import NoneSettings
from q3q.spec import Evaluation, TrialSpec

OTHER_TYPE = {"float32": "bfloat16", "bfloat16": "float32", "float16": "float32"}
OWN_WORDS = ("model", "dtype", "evaluation")  # those that `floor_job` gives anew
OF_CACHE = "kv_"


def floor_of(trial: Trial) -> Trial | None:
    """Return the trial that measures the noise floor of this one's KL; None if it measures no KL.

    A judged checkpoint's floor answers the questions too, and stands in its table. Nothing of the
    floor's is quantized or rounded, whatever the trial's is.
    """
    spec, placement = trial.spec, trial.placement
    if spec.evaluation.drift is None:
        return None
    if spec.reference is not None:
        other = replace(spec.reference, dtype=OTHER_TYPE[spec.reference.dtype])
        placed = trial.placed(model=placement.reference)
        return replace(placed, spec=replace(spec, model=other, kv=None))
    measured = spec.evaluation
    alone = TrialSpec(
        model=replace(spec.model, dtype=OTHER_TYPE[spec.model.dtype]),
        method=method_ref(NoneSettings(), None),
        scheme=None,
        calibration=None,
        evaluation=Evaluation(
            texts=measured.texts,
            version=measured.version,
            quick=measured.quick,
            drift=measured.drift,
        ),
        seed=0,
        reference=spec.model,
    )
    placed = trial.placed(reference=placement.model, tasks=None, export=None, baseline=None)
    return replace(placed, spec=alone)


def floor_job(overrides: Sequence[str], floor: Trial) -> list[str]:
    """Return the overrides of a floor.

    Args:
        overrides: of a job without quantization whose floor it is.
    """
    keys = (override.lstrip("+~").partition("=")[0].partition(".")[0] for override in overrides)
    kept = [
        override
        for override, key in zip(overrides, keys, strict=True)
        if key not in OWN_WORDS and not key.startswith(OF_CACHE)
    ]
    # The floor is compared with the model's own logits, not with another trial's record.
    apart = [] if floor.placement.baseline else ["evaluation.baseline=false"]
    return [*kept, *judged_words(floor), *evaluation_words(floor), *apart]
