"""One quantization by llm-compressor, in its own environment."""

import torch
from compressed_tensors.quantization import forward_quantize
from datasets import Dataset
from job import Job
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    job = Job.given()
    logger.remove()
    # AWQ pins its cache for a GPU's sake; where there is none, pinning stops it.
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda self, batch_index: None
    grid = {
        "num_bits": job.bits,
        "type": "int",
        "symmetric": False,
        "strategy": "group",
        "group_size": job.group_size,
    }
    scheme = {
        "config_groups": {"all": {"targets": ["Linear"], "weights": grid}},
        "ignore": ["lm_head"],
    }
    if job.method == "gptq":
        settings = {"dampening_frac": job.damping, "block_size": 128, "actorder": "static"}
        recipe = [GPTQModifier(**scheme, **settings)]
    else:
        settings = {"duo_scaling": False, "n_grid": job.grid}
        recipe = [AWQModifier(**settings), QuantizationModifier(**scheme)]
    options = {
        "pipeline": "sequential",
        # False is faster, as in AWQ's paper; GPTQ calibrates a block on the outputs of the
        # quantized blocks before it.
        "propagate_error": job.method == "gptq",
        "batch_size": 4,
        "shuffle_calibration_samples": False,
        **job.options,
    }
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    windows = job.windows()
    data = Dataset.from_dict(
        {"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()}
    )
    given = {"num_calibration_samples": len(windows), "max_seq_length": windows.shape[1], **options}
    job.run(lambda: oneshot(model=model, processor=tokenizer, dataset=data, recipe=recipe, **given))

    weights = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if ".layers." in name and weight is not None:
            scheme_of = getattr(module, "quantization_scheme", None)
            if scheme_of is not None:
                weight = forward_quantize(module, weight, "weight", scheme_of.weights)
            weights[f"{name}.weight"] = weight
    job.finish(settings | options, weights)


if __name__ == "__main__":
    main()
