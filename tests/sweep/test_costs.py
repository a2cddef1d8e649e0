"""Predicted seconds on a GPU: its kind, its waiting for the processor, and its shared time."""

from dataclasses import replace

import pytest

from q3q.record import TrialRecord
from q3q.sweep.costs import GPU_PEAKS, CostModel, Rate, ran_on
from q3q.sweep.machines import GPU_BYTES
from tests.specs import STUDY_TASKS, calibration_of
from tests.sweep.test_plan import NODE, facts, planned_for, trial

H100 = Rate("NVIDIA H100 80GB HBM3", True, 1.0)


def predicted(one, where=H100, costs=None):
    shape = facts(one.spec.model.name)
    return (costs or CostModel()).predict(one.spec, shape, where, loader="resident")


def test_a_gpu_is_as_fast_as_its_kind_is_by_rays_name_or_the_drivers():
    one, costs = trial("qwen3_32b", tasks=STUDY_TASKS), CostModel()
    seconds = [
        sum(predicted(one, Rate(name, True, 1.0)).phases.values())
        for name in ("NVIDIA H100 80GB HBM3", "A100", "NVIDIA L40S", "Tesla T4")
    ]
    assert seconds[0] < seconds[1] < seconds[3]
    assert costs.flops(H100) == costs.flops(Rate("H100", True, 1.0))
    assert costs.flops(Rate("A GPU of tomorrow", True, 1.0)) == costs.reached * costs.gpu_peak
    assert GPU_PEAKS.keys() <= {kind for name in GPU_BYTES for kind in name.split("-")}


def test_a_small_models_forward_takes_as_long_as_its_operations_take_to_issue():
    faster = replace(CostModel(), reached=1.0)
    small, large = (trial(name, "rtn", tasks=STUDY_TASKS) for name in ("qwen3_0_6b", "qwen3_32b"))
    for one, bounds in ((small, (0.999, 1.001)), (large, (0.3, 0.6))):
        slow, fast = (predicted(one, costs=costs).phases["evaluate"] for costs in (None, faster))
        assert bounds[0] < fast / slow < bounds[1]
    # While the processor issues operations, the GPU could compute another trial's.
    assert predicted(small, costs=faster).idle > predicted(small).idle


def test_what_the_processor_does_alone_is_counted_as_idle_time_of_the_gpu():
    costs = CostModel()
    plain, asked = trial(method="rtn"), trial(method="rtn", tasks=("hellaswag",))
    more = predicted(asked).idle - predicted(plain).idle
    assert more == pytest.approx(10042 * costs.question)
    calibrated = trial()
    small = replace(
        calibrated,
        spec=replace(calibrated.spec, calibration=calibration_of(samples=128, length=2048)),
    )
    epyc = Rate("EPYC", False, 2.0)
    assert predicted(calibrated, epyc).phases["calibrate"] == costs.draw
    assert predicted(calibrated).phases["calibrate"] == 0  # windows are drawn while it loads
    assert predicted(small, epyc).phases["calibrate"] == 0
    for one in (plain, asked, calibrated):
        assert predicted(one).idle <= sum(predicted(one).phases.values())
    assert predicted(asked, epyc).idle == 0


def test_a_trial_on_a_shared_gpu_corrects_by_the_time_that_it_had():
    [planned, *_] = planned_for(
        [trial("qwen3_0_6b", tasks=STUDY_TASKS, seed=seed) for seed in range(40)], [NODE]
    )
    assert planned.allocation.is_share
    assert planned.gpu_time < 1
    record = TrialRecord(
        spec=planned.spec,
        status="COMPLETED",
        metrics={},
        environment={"hardware": {"gpu": "NVIDIA H100"}, "planned": planned.to_json()},
    )
    assert ran_on(record)[0].units == pytest.approx(planned.gpu_time, abs=1e-3)
    assert sum(planned.to_json()["phases"].values()) == pytest.approx(planned.seconds, rel=1e-3)
    # Older plans said only which share it was, and predicted that it has that part of the time.
    older = replace(
        record, environment={**record.environment, "planned": {"gpus": 0.5, "loader": "resident"}}
    )
    assert ran_on(older)[0].units == 0.5
