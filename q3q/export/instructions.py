"""How to load and serve an export: the lines that its card prints. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from q3q.export.formats import (
    FORMATS,
    GPTQMODEL_AWQ_GROUPS,
    GPTQMODEL_GROUPS,
    schemes_of,
)
from q3q.export.serving import (
    needs_unpacking,
    read_by_transformers,
    servable,
    unserved,
    why_unread,
)
from q3q.models.facts import ModelFacts
from q3q.spec import TrialSpec

PACKAGES = {
    "hf": "torch transformers",
    "compressed_tensors": "torch transformers compressed-tensors",
    "gptq": "torch transformers optimum gptqmodel",
    "awq": "torch transformers accelerate gptqmodel",
    "gguf": "llama-cpp-python",
}
LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")"""
# By default transformers refuses the zero points of asymmetric packed weights.
LOAD_UNPACKED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

folder = "."  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
unpack = CompressedTensorsConfig(dequantize=True)  # run_compressed=False in older transformers
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=unpack)"""
LOAD_GGUF = """\
from llama_cpp import Llama

model = Llama("model.gguf", n_ctx=2048)  # in this folder
print(model("Once upon a time", max_tokens=20)["choices"][0]["text"])"""
GENERATE = """\
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0]))"""


@dataclass(frozen=True)
class LoadingCode:
    """How Python loads the checkpoint.

    packages: to install
    code: None if transformers does not read it
    remark: what a reader must know besides, in sentences
    """

    packages: str
    code: str | None
    remark: str = ""


def loading_of(spec: TrialSpec, facts: ModelFacts) -> LoadingCode:
    """Return how transformers loads a trial's export, or why it does not."""
    assert spec.export is not None
    packages = PACKAGES[spec.export]
    if spec.export == "gguf":
        return LoadingCode(packages, LOAD_GGUF, "llama.cpp's own programs take the file, too.")
    if not read_by_transformers(spec, facts):
        return LoadingCode(packages, None, why_unread(spec, facts))
    if needs_unpacking(spec, facts):
        remark = (
            "The weights are unpacked as they are loaded, so in memory they take as much room as "
            "unquantized ones."
        )
        return LoadingCode(packages, f"{LOAD_UNPACKED}\n\n{GENERATE}", remark)
    code = f"{LOAD}\n\n{GENERATE}"
    if spec.export not in ("gptq", "awq"):
        return LoadingCode(packages, code)
    taken = GPTQMODEL_GROUPS if spec.export == "gptq" else GPTQMODEL_AWQ_GROUPS
    others = sorted({scheme.group_size for scheme in schemes_of(spec, facts)} - {*taken})
    if others:
        sizes = ", ".join(map(str, others))
        return LoadingCode(packages, None, f"GPTQModel's kernels do not take group_size={sizes}.")
    return LoadingCode(packages, code, "transformers hands these weights to GPTQModel's kernels.")


def load_lines(spec: TrialSpec, facts: ModelFacts) -> list[str]:
    """Return the card's section on Python."""
    loading = loading_of(spec, facts)
    lines = ["## Load it in Python", ""]
    if loading.code is not None:
        lines += ["```bash", f"pip install {loading.packages}", "```", ""]
        lines += ["```python", *loading.code.splitlines(), "```", ""]
    return lines + ([loading.remark, ""] if loading.remark else [])


def serve_lines(spec: TrialSpec, facts: ModelFacts) -> list[str]:
    """Return the card's section on serving: vLLM's command, or why vLLM does not take it."""
    assert spec.export is not None
    form = FORMATS[spec.export]
    if form.own_server:
        return ["## Serve it", "", "```bash", "llama-server -m model.gguf", "```", ""]
    reason = unserved(form, spec, facts)
    if reason is None:
        return [
            "## Serve it",
            "",
            "```bash",
            "pip install vllm",
            "vllm serve . # this folder",
            "curl localhost:8000/v1/completions -H 'Content-Type: application/json' "
            """-d '{"model": ".", "prompt": "Hello"}'""",
            "```",
            "",
        ]
    loaders = [f"- {name}: {scope}" for name, _, scope in form.loaders if "vLLM" not in name]
    return [
        "## Serve it",
        "",
        f"vLLM does not load `{spec.export}` with {reason}. {_instead(servable(spec, facts))}"
        "Other programs that load this format:",
        "",
        *loaders,
        "",
    ]


def _instead(able: Sequence[str]) -> str:
    return f"It loads these settings as export={' or '.join(able)}. " if able else ""
