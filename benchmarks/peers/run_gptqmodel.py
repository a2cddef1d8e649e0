"""One quantization by GPTQModel, in its own environment."""

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from job import Job


def main() -> None:
    job = Job.given()
    settings = {
        "sym": False,
        "desc_act": True,
        "static_groups": True,
        "act_group_aware": False,
        "true_sequential": False,
        "damp_percent": job.damping,
        "offload_to_disk": False,
        **job.options,
    }
    config = QuantizeConfig(bits=job.bits, group_size=job.group_size, device="cpu", **settings)
    model = GPTQModel.load(job.model, config, dtype=torch.float32)
    data = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job.windows().tolist()]
    batch = {"batch_size": 4}
    job.run(lambda: model.quantize(data, **batch))
    packed = {
        name: module
        for name, module in model.model.named_modules()
        if hasattr(module, "dequantize_weight")
    }
    for module in packed.values():
        if (
            module.qzero_format() == 1
        ):  # zero points one too low, as in GPTQ files; its dequantization wants them plain
            convert_gptq_v1_to_v2_format_module(module, bits=job.bits, pack_dtype=module.pack_dtype)
    job.finish(
        settings | batch,
        {f"{name}.weight": module.dequantize_weight().T for name, module in packed.items()},
    )


if __name__ == "__main__":
    main()
