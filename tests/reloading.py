"""The proof of an export without another process, which takes seconds to start."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from q3q.export.reload import script


def reload_here(folder: Path, inputs: Path, out: Path, seconds: float, gpu: bool) -> None:
    """Find what the other process would; for `proof._reload`."""
    given = None if inputs.name == "weights" else load_file(inputs)
    found, tensors = script.findings(folder, given)
    out.with_suffix(".json").write_text(json.dumps(found))
    save_file(tensors, out.with_suffix(".safetensors"))
