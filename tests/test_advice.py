"""What an error advises works: each case takes the advice, word by word."""

import re
from pathlib import Path

import pytest

from q3q.errors import ConfigError
from tests.composed import composed_trial

ROOT = Path(__file__).parent.parent


def followed(words, advice):
    """Return a command line with the advised settings in the place of its own."""
    advised = advice.split()
    keys = {word.partition("=")[0] for word in advised}
    return [word for word in words if word.partition("=")[0] not in keys] + advised


def advised(line, pattern):
    """Return the settings that a line advises: each group of the pattern, or each of its items."""
    match = re.search(pattern, line)
    assert match, line
    return [found for found in match.groups() if found]


def each(key, text):
    return [f"{key}={item.strip(' []')}" for item in re.split(r",| or ", text)]


# A command line that is refused; where its line says what helps; and the settings, if the words
# found are values of one.
CASES = {
    "a size": ("method=rtn group_size=100", r"sizes that do: (.*)", "group_size"),
    "a size for binarizing": ("method=billm group_size=100", r"sizes that do: (.*)", "group_size"),
    "a size of some layers": (
        "method=rtn overrides={*.down:{group_size:100}}",
        r"sizes that do: (.*)",
        "group_size",
    ),
    "a size of the ends": (
        "method=rtn group_size=100 overrides={blocks.*:{group_size:32}} head_bits=8 "
        "embedding_bits=8",
        r"sizes that do: (.*)",
        "group_size",
    ),
    "the ends alone": (
        "method=none head_bits=8 embedding_bits=8",
        r"alone: (method=rtn skip=\S+)",
        None,
    ),
    "nothing left": ("method=rtn skip=[blocks.*]", r"that is (method=none)", None),
    "an asymmetric grid": (
        "method=smoothquant symmetric=false",
        r"; (method=rtn) rounds asymmetrically",
        None,
    ),
    "memory for a loader": (
        "method=gptq loader=resident memory=100MB",
        r"it needs ([\d.]+) GB",
        "memory",
    ),
    "memory for any loader": (
        "method=gptq memory=100MB",
        r"streamed it needs ([\d.]+) GB, resident ([\d.]+) GB",
        "memory",
    ),
    "a size of memory": ("method=rtn memory=8GiBB", r"such as (\S+) \S+ or (\S+)", "memory"),
    "a text to calibrate on": (
        "method=gptq calibration.path=TEXT",
        r"add (calibration=file)",
        None,
    ),
    "a text to evaluate on": (
        "method=rtn evaluation.path=TEXT",
        r"give (evaluation.texts=\S+), or (evaluation=file)",
        None,
    ),
    "a place for an export": (
        "method=rtn export.path=PLACE",
        r"e\.g\. (export=hf)",
        None,
    ),
    "a format": ("method=rtn bits=3 export=awq", r"these can: export=(.*)", "export"),
    "a format for one bit": ("method=billm export=gptq", r"these can: export=(.*)", "export"),
    "an order of columns": (
        "method=gptq export=compressed_tensors",
        r"\((method.static_groups=true)",
        None,
    ),
    "activations": (
        "method=rtn bits=4 act_bits=8 export=compressed_tensors",
        r"it takes (bits=8 act_bits=8 group_size=-1 symmetric=true)",
        None,
    ),
    "a window": ("method=rtn evaluation.window=100000", r"at most (\d+)", "evaluation.window"),
    "a number of windows": (
        "method=rtn evaluation.quick=true evaluation.limit=null",
        r"give (evaluation.limit)",
        "limit",
    ),
    "a draw": ("method=gptq calibration.draw=all", r"Choose from: (.*)", "calibration.draw"),
    "a dtype": ("method=rtn dtype=float99", r"Choose from: (.*)", "dtype"),
    "a loader": ("method=rtn loader=sideways", r"Choose from: (.*)", "loader"),
    "a folder": ("model=demo model.path=/nowhere", r"give (model=local)", "local"),
    "one long document": (
        "method=awq BOOK",
        r"Give (calibration.draw=random), which",
        None,
    ),
    "one short document": (
        "method=awq calibration.length=100000 BOOK",
        r"Give (calibration.draw=random calibration.length=\d+), or a \.jsonl",
        None,
    ),
    "a short text": (
        "method=gptq calibration.length=100000 BOOK",
        r"Give (calibration.length=\d+) or less",
        None,
    ),
    "too few consecutive windows": (
        "method=gptq calibration.draw=first calibration.length=512 calibration.samples=400 BOOK",
        r"Give (calibration.samples=\d+) or less, or (calibration.length=\d+) or less",
        None,
    ),
    "few of many documents": (
        "method=awq calibration.samples=2 calibration=file calibration.path=LINES",
        r"Give (calibration.draw=random), which cuts windows anywhere in the text$",
        None,
    ),
    "a short text to evaluate on": (
        "method=rtn evaluation=file evaluation.path=SHORT evaluation.window=2048",
        r"Give (evaluation.window=\d+) or less",
        None,
    ),
}


@pytest.fixture
def files(tmp_path):
    sentence = "Anna went to the river and saw a dog near the old house. "
    texts = {"TEXT": sentence * 3000, "BOOK": sentence * 3000, "SHORT": sentence * 20}
    paths = {name: tmp_path / f"{name.lower()}.txt" for name in texts}
    for name, text in texts.items():
        paths[name].write_text(text)
    paths["LINES"] = tmp_path / "lines.jsonl"
    paths["LINES"].write_text('{"text": "Anna saw a dog near the house."}\n' * 400)
    paths["PLACE"] = tmp_path / "place"
    return paths


@pytest.mark.parametrize("case", CASES)
def test_what_a_line_advises_works(files, tmp_path, case):
    command, pattern, key = CASES[case]
    command = command.replace("BOOK", "calibration=file calibration.path=BOOK")
    for name, path in files.items():
        command = command.replace(f"path={name}", f"path={path}")
    words = [*command.split(), f"storage={tmp_path}"]
    if not any(word.startswith("evaluation") for word in words):
        words.append("evaluation=none")
    with pytest.raises(ConfigError) as refusal:
        composed_trial(*words)
    line = str(refusal.value)
    found = advised(line, pattern)
    if key == "limit":
        found = [f"{found[0]}=4"]
    elif key == "local":
        model = ROOT / "q3q" / "models" / "demo" / "dense"
        found = [f"{found[0]} model.path={model}"]
    elif key == "memory":
        found = [f"memory={size if size.endswith('B') else size + 'GB'}" for size in found]
    elif key is not None:
        found = [setting for text in found for setting in each(key, text)]
    if "overrides={*.down" in command:
        found = [f"overrides={{*.down:{{{setting.replace('=', ':')}}}}}" for setting in found]
    assert found
    for setting in found:
        composed_trial(*followed(words, setting))
