"""Make a published checkpoint with another quantizer, load it again, and write its logits.

Run in that quantizer's own environment: `python published.py JOB.json`. The job says which maker
(`llmcompressor`, `gptqmodel`, `bitsandbytes`, `autoround`, `autoawq`, `fp8`, `modelopt`, `gguf`),
the original's folder, where to write, the settings, and a file with the token ids `calibration` and
`evaluation`. The format's own loader reads the files, and transformers computes in float32.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
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
        loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
        for tensor in loaded.parameters():  # it unpacks experts to bfloat16
            tensor.data = tensor.data.float() if tensor.is_floating_point() else tensor.data
        return loaded
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
    if form == "auto_awq":
        return _unpacked_awq(model, folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    modules = dict(plain.named_modules())
    for name, module in loaded.named_modules():
        if hasattr(module, "qweight"):  # a layer's outputs for the unit vectors are its weights
            columns = modules[name].weight.shape[1]
            modules[name].weight.data.copy_(module(torch.eye(columns)).T)
    return plain


def _unpacked_awq(model: str, folder: Path) -> Any:
    """Its loader for processors is GPTQModel, so auto-round's own unpacker fills a plain model."""
    from auto_round.export.export_to_awq.utils import dequantize_gemm
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    stored, modules = _tensors(folder), dict(plain.named_modules())
    known = plain.state_dict().keys()  # the file has what is not quantized in float16
    plain.load_state_dict({k: t.float() for k, t in stored.items() if k in known}, strict=False)
    for name in [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]:
        words = (stored[f"{name}.{part}"] for part in ("qweight", "qzeros"))
        scales = stored[f"{name}.scales"].float()
        weight = dequantize_gemm(*words, scales, config["bits"], config["group_size"]).T
        modules[name].weight.data.copy_(weight)
    return plain


def fp8(model: str, output: Path, settings: dict[str, Any], windows: Tensor) -> Any:
    """transformers' FP8 in blocks. Its kernels need a GPU: inputs are rounded here in plain torch.

    Each linear's weights are those of transformers' own conversion, read by its own loader.
    """
    from types import SimpleNamespace

    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    # The conversion leaves out what blocks do not divide, here k and v. q reads the same input.
    ends = ("q_proj", "k_proj", "v_proj")
    apart = [name for name, _ in original.named_modules() if name.endswith(ends)]
    left_out = ["lm_head", *apart]
    config = FineGrainedFP8Config(weight_block_size=(128, 128), modules_to_not_convert=left_out)
    convert = Fp8Quantize(SimpleNamespace(quantization_config=config))
    tensors: dict[str, Tensor] = {}
    for name, tensor in original.state_dict().items():
        inner = name.endswith("_proj.weight") and name.removesuffix(".weight") not in apart
        as_read: Any = {name: tensor}
        tensors |= convert.convert(as_read) if inner else as_read
    tied = original.config.tie_word_embeddings
    output.mkdir()
    save_file(
        {key: t.contiguous() for key, t in tensors.items() if not (tied and "lm_head" in key)},
        output / "model.safetensors",
        metadata={"format": "pt"},
    )
    stored = AutoConfig.from_pretrained(model).to_dict()
    stored |= {"quantization_config": config.to_dict(), "dtype": "float32"}
    (output / "config.json").write_text(json.dumps(stored, default=str), encoding="utf-8")
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    for name, module in loaded.named_modules():
        if name.endswith("_proj") and name not in apart:
            module.register_forward_pre_hook(_rounded_in_groups)
    return loaded


def _rounded_in_groups(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round as the Triton kernel act_quant does: a scale for 128 channels of a token."""
    groups = inputs[0].unflatten(-1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 448
    scale = torch.where(scale > 0, scale, 1.0)
    return ((groups / scale).to(torch.float8_e4m3fn).float().mul(scale).flatten(-2), *inputs[1:])


def modelopt(model: str, output: Path, settings: dict[str, Any], windows: Tensor) -> Any:
    """Its servers need a GPU, and its emulation has other scales than the files.

    The export gives q, k and v, and gate and up, one scale. So the files' numbers fill a plain
    model, NVFP4's by ModelOpt's own unpacker, and inputs are rounded here in plain torch.
    """
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor import NVFP4QTensor
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def calibrate(one: Any) -> None:
        for row in windows:
            one(row[None])

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    own = mtq.quantize(plain, getattr(mtq, settings["config"]), calibrate)
    export_hf_checkpoint(own, dtype=torch.float32, export_dir=str(output))
    AutoTokenizer.from_pretrained(model).save_pretrained(output)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    stored, modules = _tensors(output), dict(plain.named_modules())
    for name in [key.removesuffix(".input_scale") for key in stored if key.endswith("put_scale")]:
        codes, scale = stored[f"{name}.weight"], stored[f"{name}.weight_scale"]
        weight = modules[name].weight
        rounding: Callable[..., tuple[Tensor, ...]] = _rounded_by
        if (factor := stored.get(f"{name}.weight_scale_2")) is None:
            numbers = codes.float() * scale
        else:
            rounding = _rounded_below
            packed = NVFP4QTensor(weight.shape, torch.float32, codes)
            numbers = packed.dequantize(
                dtype=torch.float32, scale=scale, double_scale=factor, block_sizes={-1: 16}
            )
        weight.data.copy_(numbers)
        hook = partial(rounding, stored[f"{name}.input_scale"])
        modules[name].register_forward_pre_hook(hook)
    return plain


def _rounded_by(scale: Tensor, _: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round to E4M3 with one stored scale."""
    limited = (inputs[0] / scale).clamp(-448, 448)
    return (limited.to(torch.float8_e4m3fn).float() * scale, *inputs[1:])


def _rounded_below(factor: Tensor, _: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Round to E2M1 with an E4M3 scale for 16 channels, times the stored number; ties to even.

    Scales are multiplied by the number's reciprocal before they are rounded, as vLLM's kernel does.
    """
    groups, number = inputs[0].unflatten(-1, (-1, 16)), 1 / factor
    scale = (number * (groups.abs().amax(-1, keepdim=True) / 6)).clamp(2.0**-9, 448)
    scale = scale.to(torch.float8_e4m3fn).float() / number
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    middles = (levels[1:] + levels[:-1]) / 2
    size = (groups / scale).abs()[..., None]
    even = torch.arange(len(middles)) % 2 == 0
    code = torch.where(even, size > middles, size >= middles).sum(-1)
    return ((levels[code].copysign(groups) * scale).flatten(-2), *inputs[1:])


def _tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        found |= load_file(shard)
    return found


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
