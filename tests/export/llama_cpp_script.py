"""Run by a Python that has llama_cpp, not by the tests': what llama.cpp makes of a file.

python llama_cpp_script.py FOLDER, which holds request.json:

    model: name of a GGUF file
    ids: its logits for these tokens, [T, V]
    texts: the token ids of each, from 0 on; with them no weights are read
    weights: {type: name of a file of float32 numbers [O, I]}; llama.cpp's own bytes of them
    bytes: {type: name of a file of such bytes}; the numbers that llama.cpp reads in them
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def library():
    """Return llama.cpp's library of number types, which lies beside the one that runs models."""
    [path] = {
        *Path(llama_cpp.__file__).parent.rglob("libggml-base.so"),
        *Path(llama_cpp.__file__).parent.rglob("libggml-base.dylib"),
    }
    return ctypes.CDLL(str(path))


def pointer(array):
    return array.ctypes.data_as(ctypes.c_void_p)


def main():
    folder = Path(sys.argv[1])
    request, out = json.loads((folder / "request.json").read_text()), {}
    base = library()
    for kind, file in request.get("weights", {}).items():
        numbers = np.ascontiguousarray(np.load(folder / file))
        rows, columns = numbers.shape
        content = np.zeros(rows * columns * 2, np.uint8)
        quantize = getattr(base, f"quantize_{kind}")
        quantize.restype = ctypes.c_size_t
        count = ctypes.c_int64
        size = quantize(pointer(numbers), pointer(content), count(rows), count(columns), None)
        out[f"bytes/{kind}"] = content[:size].reshape(rows, -1)
    for kind, file in request.get("bytes", {}).items():
        content = np.ascontiguousarray(np.load(folder / file))
        numbers = np.zeros(request["numbers"], np.float32)
        dequantize = getattr(base, f"dequantize_row_{kind}")
        dequantize(pointer(content), pointer(numbers), ctypes.c_int64(numbers.size))
        out[f"numbers/{kind}"] = numbers
    if "ids" in request:
        # A cache in float32: llama.cpp's own is in float16, as flash attention's arithmetic is.
        model = llama_cpp.Llama(
            str(folder / request["model"]),
            n_ctx=128,
            n_threads=1,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            logits_all=True,
            verbose=False,
        )
        model.eval(request["ids"])
        out["logits"] = np.array(model.scores[: len(request["ids"])])
    if "texts" in request:
        model = llama_cpp.Llama(str(folder / request["model"]), vocab_only=True, verbose=False)
        for k, text in enumerate(request["texts"]):
            out[f"{k}"] = np.array(model.tokenize(text.encode(), add_bos=False, special=True))
    np.savez(folder / "out.npz", **out)  # type: ignore[arg-type]  # names, as arrays are


if __name__ == "__main__":
    main()
