"""One quantization by the official driver's plain transcription (tests/fidelity/plain.py)."""

import sys
from pathlib import Path
from typing import Any

from job import Job

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "fidelity"))
import plain


def main() -> None:
    job = Job.given()
    windows, model = job.windows(), plain.load(job.model)
    knobs: dict[str, Any]
    if job.method == "gptq":
        knobs = {"act_order": True, "static_groups": True, "true_sequential": False}
        knobs |= {"damping": job.damping, **job.options}
        job.run(lambda: plain.gptq(model, windows, job.bits, job.group_size, **knobs))
    else:
        knobs = {"clip": False, "grid": job.grid, **job.options}
        job.run(lambda: plain.awq(model, windows, job.bits, job.group_size, **knobs))
    state = model.state_dict()
    job.finish(knobs, {name: state[name] for name in state if name.startswith("model.layers.")})


if __name__ == "__main__":
    main()
