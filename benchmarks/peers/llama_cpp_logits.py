"""Quantize a GGUF file with llama.cpp, and write its logits: `python llama_cpp_logits.py JOB.json`.

Run where llama-cpp-python is installed. The job says the original's file, where to write, the type
(`Q4_K_M`), a file of token ids [N, T] (.npy), and where the logits go (.npy).
"""

import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{job['type']}")
    wanted.nthread = 1
    files = (job["original"].encode(), job["output"].encode())
    if llama_cpp.llama_model_quantize(*files, wanted):
        raise RuntimeError(f"llama.cpp made no {job['type']} of {job['original']}")
    windows = np.load(job["tokens"])
    model = llama_cpp.Llama(
        job["output"], n_ctx=windows.shape[1], n_threads=1, logits_all=True, verbose=False
    )
    logits = []
    for ids in windows:
        model.reset()
        model.eval(ids.tolist())
        logits.append(np.array(model.scores[: len(ids)]))
    np.save(job["logits"], np.stack(logits))


if __name__ == "__main__":
    main()
