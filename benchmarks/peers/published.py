"""Make a published checkpoint with another quantizer, load it again, and write its logits.

Run in that quantizer's own environment: `python published.py JOB.json`. The job says which maker
(`llmcompressor`, `gptqmodel`, `bitsandbytes`, `autoround`, `gguf`), the original's folder, where to
write, the settings, and a file with the token ids `calibration` and `evaluation`. The format's own
loader reads the files, and transformers computes in float32.
"""

import json
import sys
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    tokens = load_file(job["tokens"])
    output = Path(job["output"])
    make = globals()[job["maker"]]
    model = make(job["model"], output, job["settings"], tokens["calibration"])
    model.eval()
    with torch.inference_mode():
        logits = [model(row[None]).logits[0].float() for row in tokens["evaluation"]]
    save_file({"logits": torch.stack(logits).contiguous()}, job["logits"])


def llmcompressor(model: str, output: Path, settings: dict[str, Any], windows: Tensor) -> Any:
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    data = Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    )
    recipe = QuantizationModifier(targets="Linear", ignore=["lm_head"], **settings)
    oneshot(
        model=original,
        processor=tokenizer,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
    )
    original.save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)
    if not settings["scheme"].startswith("NVFP4"):
        return AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    # It unpacks NVFP4 to bfloat16, whatever the model's type. Inputs are rounded all the same.
    config = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(output, quantization_config=config).float()


def gptqmodel(model: str, output: Path, settings: dict[str, Any], windows: Tensor) -> Any:
    """GPTQModel's kernels compute in 16 bits, so its weights go into a plain model."""
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
    from transformers import AutoModelForCausalLM

    config = QuantizeConfig(device="cpu", offload_to_disk=False, **settings)
    own = GPTQModel.load(model, config, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in windows.tolist()]
    own.quantize(rows, batch_size=4)
    own.save(str(output))
    # The type of the stored scales: to a model in bfloat16 it rounds them.
    loaded = GPTQModel.load(str(output), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    modules = dict(plain.named_modules())
    for name, module in loaded.model.named_modules():
        if hasattr(module, "dequantize_weight"):
            if module.qzero_format() == 1:
                convert_gptq_v1_to_v2_format_module(
                    module, bits=module.bits, pack_dtype=module.pack_dtype
                )
            weight = module.dequantize_weight().T.float()
            modules[name].weight.data.copy_(weight)
    return plain


def bitsandbytes(model: str, output: Path, settings: dict[str, Any], windows: Tensor) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(**settings)
    own = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    own.save_pretrained(output)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, device_map="cpu")
    for module in loaded.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # That kernel computes in bfloat16, whatever bnb_4bit_compute_dtype says.
            cast(Any, module).support_avx512bf16_for_cpu = False
    return loaded


def autoround(model: str, output: Path, settings: dict[str, Any], windows: Tensor) -> Any:
    """Its loader computes in float16, so its weights go into a plain model in float32."""
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    form = settings.pop("format")
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [
        {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in windows
    ]
    own = AutoRound(
        original,
        tokenizer,
        dataset=rows,
        seqlen=windows.shape[1],
        nsamples=len(windows),
        device_map="cpu",
        **settings,
    )
    own.quantize_and_save(str(output), format=form)
    folder = next(output.rglob("config.json")).parent  # one of its own, inside
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    modules = dict(plain.named_modules())
    for name, module in loaded.named_modules():
        if hasattr(module, "qweight"):  # a layer's outputs for the unit vectors are its weights
            columns = modules[name].weight.shape[1]
            modules[name].weight.data.copy_(module(torch.eye(columns)).T)
    return plain


def gguf(model: str, output: Path, settings: dict[str, Any], windows: Tensor) -> Any:
    """The file was written before; transformers dequantizes it with the gguf package."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = Path(settings["file"])
    config = AutoConfig.from_pretrained(model)  # of the file transformers reads no head size
    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    )


if __name__ == "__main__":
    main()
