"""The findings of the other process, and where it begins."""

import errno
import importlib.util
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .configs import UNPACKER, read_config, roundings_of
from .loaders import load, load_by_gptqmodel, weights_on_disk
from .running import in_float32, logits_of, round_activations, run
from .sketches import sketch
from .unpackers import Parts, input_factors, numbers_on_disk
from .use import MESSAGE_LENGTH, generate, measured, peak_resident_bytes

EXIT_SHORTAGE = 75  # the exit code if memory, disk or open files run short; a retry may succeed
SHORTAGES = (errno.ENOMEM, errno.EMFILE, errno.ENOSPC, errno.EDQUOT)


def findings(
    folder: Path, inputs: Parts | None, *, measure: bool = False
) -> tuple[dict[str, Any], Parts]:
    """Return the content of OUT.json and of OUT.safetensors; without `inputs`, of weights alone.

    Args:
        measure: generate with public loaders.
    """
    config = read_config(folder)
    packed = config.get("quantization_config") or {}
    roundings, factors = roundings_of(packed), input_factors(folder)
    if inputs is None:
        sketches = {name: sketch(tensor) for name, tensor in numbers_on_disk(folder, config)}
        loader = f"{UNPACKER}, weight by weight"
        facts = {"loader": loader, "roundings": roundings, "factors": factors}
        return facts | {"sketches": sketches}, {}
    import torch

    ids, idle_bytes = inputs["ids"], peak_resident_bytes()
    model, loader = load(folder)
    public, use = not loader.startswith(UNPACKER), list[dict[str, Any]]()
    if measure and public:
        use = measured(partial(generate, model, ids, idle_bytes))
    model(ids[:1, :1])  # compressed-tensors unpacks when the model first runs
    sketches = {name: sketch(tensor) for name, tensor in weights_on_disk(model, config)}
    for module in model.modules():
        module.quantization_enabled = False  # else compressed-tensors rounds activations too
    dtype = model.dtype
    in_float32(model)
    tensors = {"logits": logits_of(model, ids)}
    tensors |= {f"plain/{name}": x for name, x in run(model, ids, inputs["plain"]).items()}
    if roundings and "rounded" in inputs:
        round_activations(model, packed, factors)
        tensors |= {f"rounded/{name}": x for name, x in run(model, ids, inputs["rounded"]).items()}
    del model
    gptqmodel_reads = packed.get("quant_method") in ("gptq", "awq")
    if gptqmodel_reads and importlib.util.find_spec("gptqmodel") is not None:
        try:
            second = load_by_gptqmodel(folder, dtype)
        except Exception as error:  # of any kind: the weights were all read above
            if is_shortage(error):
                raise
            reason = " ".join(str(error).split())[:MESSAGE_LENGTH]
            loader += f" (GPTQModel does not load it: {reason})"
        else:
            tensors["public"] = logits_of(second, ids)
            loader += ", and by GPTQModel"
    if measure and public and torch.cuda.is_available():
        use += measured(lambda: generate(load(folder)[0].to("cuda"), ids, None))
    facts = {"loader": loader, "roundings": roundings, "factors": factors}
    return facts | {"sketches": sketches, "use": use}, tensors


def main() -> None:
    folder, inputs, out, *packages = map(Path, sys.argv[1:])
    sys.modules["q3q"] = None  # type: ignore[assignment]  # from here on, importing it fails
    sys.path += map(str, packages)
    import torch
    from safetensors.torch import load_file, save_file

    with torch.inference_mode():
        tensors_in = None if inputs.name == "weights" else load_file(inputs)
        facts, tensors = findings(folder, tensors_in, measure=True)
    save_file(tensors, out.with_suffix(".safetensors"))
    out.with_suffix(".json").write_text(json.dumps(facts), encoding="utf-8")


def is_shortage(error: BaseException) -> bool:
    """Return True if the failure is the machine's, not the checkpoint's."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in SHORTAGES):
        return True
    # safetensors' errors have the number in their text alone.
    number = re.search(r"\bos error (\d+)", str(error))
    if number is not None and int(number[1]) in SHORTAGES:
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def begin() -> None:
    """Run `main`; exit with EXIT_SHORTAGE where what failed says nothing about the checkpoint."""
    try:
        main()
    except Exception as error:
        if not is_shortage(error):
            raise
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(EXIT_SHORTAGE)
