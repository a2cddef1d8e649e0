"""Methods that people write themselves: fractional zero points, crashes, and changes of the code.

HQQ, in tests/outside, stands for a method of another package.
"""

import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from safetensors.torch import load_file

from q3q import crash
from q3q.config import resolve, schema
from q3q.errors import IncompatibleError
from q3q.models.hub import facts_of_trial
from q3q.quantize.block_store import BlockStore
from q3q.quantize.methods import registry, source
from q3q.sweep.in_process import InProcess
from q3q.sweep.run import run_study
from q3q.sweep.settings import StudySettings
from q3q.track.wording import trial_note
from q3q.trial import attempt_trial
from q3q.trials.stored import find_trials, listed
from tests.test_plugins import pretend_to_install

ROOT = Path(__file__).parent.parent
OUTSIDE = Path(__file__).parent / "outside"
SMALL = [
    "evaluation.tasks=[]",
    "evaluation.texts=[demo]",
    "evaluation.limit=2",
    "evaluation.window=64",
    "evaluation.baseline=false",
    "evaluation.drift=false",
    "model=local",
    "model.path=${oc.env:TINY}",
    "group_size=64",
    "bits=3",
]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Return a function that installs methods of packages in a folder, as if q3q started after."""
    store = ConfigStore.instance()
    before = {group: dict(store.repo.get(group, {})) for group in ("method", "schema")}
    monkeypatch.syspath_prepend(tmp_path / "site")
    caches = (registry.offers, resolve._warn_of_broken_methods, source._digest_of)

    def install(folder, points):
        monkeypatch.syspath_prepend(folder)
        if not (tmp_path / "site").exists():
            pretend_to_install(tmp_path / "site", "outside", points)
        for cached in caches:
            cached.cache_clear()
        schema.register()

    yield install
    store.repo.update(before)
    for name in [name for name in sys.modules if name.startswith(("q3q_hqq", "q3q_own"))]:
        del sys.modules[name]
    for cached in caches:
        cached.cache_clear()


@pytest.fixture(autouse=True)
def registered(tiny, monkeypatch):
    schema.register()
    monkeypatch.setenv("TINY", str(tiny))


@pytest.fixture
def hqq(installed):
    names = {"hqq": "Hqq", "silent": "Silent"}
    installed(OUTSIDE, {name: f"q3q_hqq.settings:{kind}Settings" for name, kind in names.items()})


def composed(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", [*SMALL, *overrides])


def trial(*overrides):
    return resolve.trial_from(composed(*overrides))


def test_fractional_zero_points_are_kept_through_blocks_evaluation_and_export(
    hqq, tmp_path, monkeypatch
):
    from q3q_hqq.method import Hqq

    meant: dict[str, torch.Tensor] = {}
    quantize = Hqq.quantize

    def remembering(self, task, scheme):
        codes = quantize(self, task, scheme)
        for name, rows in task.rows.items():
            own = codes.rows(rows.start, rows.stop)
            meant[f"model.layers.{task.block}.{name}"] = own.scale_EOG[..., None] * (
                own.codes_EOI.float().unflatten(2, (own.scale_EOG.shape[2], -1))
                - own.zero_EOG[..., None]
            )
        return codes

    monkeypatch.setattr(Hqq, "quantize", remembering)
    one = trial("method=hqq", "keep=blocks", "export=hf", f"storage={tmp_path / 's'}")
    record = attempt_trial(one)
    assert record.completed, record.reason
    # 3 bits a code, and of each group of 64 a scale and a zero point, 16 bits each.
    assert record.metrics["bits_per_weight"] == 3 + 32 / 64

    kept = BlockStore(one.kept_blocks_folder, identity=one.spec.quantization_id)
    files = Path(one.placement.export).glob("*.safetensors")
    exported = {key: tensor for file in files for key, tensor in load_file(file).items()}
    fractions = 0
    for k in range(len(list(one.kept_blocks_folder.glob("block_*.json")))):
        block = kept.load(k)
        assert block is not None
        for key, stored in block.quantized.items():
            expected = meant.pop(f"model.layers.{k}.{key}").flatten(2)
            assert torch.equal(stored.dequantize(), expected)
            assert torch.equal(exported[f"model.layers.{k}.{key}"], expected[0])
            fractions += int((stored.to_tensors()["zero"] % 1 != 0).sum())
    assert not meant
    assert fractions > 1000

    again = attempt_trial(trial("method=hqq", "evaluation.limit=3", f"storage={tmp_path / 's'}"))
    assert again.notes["blocks_from_disk"] == 3


@pytest.mark.parametrize("name", ["gptq", "awq", "compressed_tensors"])
def test_a_format_that_holds_whole_zero_points_is_refused_before_anything_runs(hqq, tmp_path, name):
    words = ["bits=4", f"export={name}", f"storage={tmp_path}"]
    with pytest.raises(IncompatibleError) as refusal:
        trial("method=hqq", *words)
    assert "hqq's zero points, which are not whole numbers; these can: export=hf" in str(
        refusal.value
    )
    trial("method=silent", *words)  # which did not say so


def test_a_method_that_does_not_say_so_is_refused_before_its_block_is_written(hqq, tmp_path):
    one = trial("method=silent", "bits=4", "export=gptq", f"storage={tmp_path}")
    record = attempt_trial(one)
    assert record.reason == (
        "export=gptq cannot hold zero points that are not whole numbers within the codes' bits "
        "(model.layers.0.self_attn.q_proj.weight). export=hf stores all"
    )
    assert not list(tmp_path.rglob("model-*.safetensors"))


OWN_SETTINGS = """
from dataclasses import dataclass
from typing import ClassVar
from q3q.quantize.methods.settings import MethodSettings

@dataclass
class OwnSettings(MethodSettings):
    name: str = "own"
    implementation: ClassVar[str] = "q3q_own.method:Own"
    keeps_hessian: ClassVar[bool] = False
"""
OWN_METHOD = '''"""Round to nearest."""
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.weights import round_to_grid
from q3q.quantize.method import Method

class Own(Method):
    def quantize(self, task, scheme):
        """Round."""
        shrink = 1.0  # a comment
        groups = into_groups(task.weight_EOI, scheme.group_size)
        grid = minmax_grid(groups * shrink, scheme.bits, symmetric=scheme.symmetric)
        return round_to_grid(
            task.weight_EOI, grid, scheme.bits, scheme.group_size, symmetric=scheme.symmetric
        )
'''


@pytest.fixture
def own(installed, tmp_path):
    """Return a function that writes the code of a method `own`, as an editor would."""
    folder = tmp_path / "source" / "q3q_own"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "settings.py").write_text(OWN_SETTINGS)

    def write(old="", new=""):
        assert old in OWN_METHOD
        (folder / "method.py").write_text(OWN_METHOD.replace(old, new, 1))
        for name in [name for name in sys.modules if name.startswith("q3q_own")]:
            del sys.modules[name]
        installed(folder.parent, {"own": "q3q_own.settings:OwnSettings"})

    return write


CRASHES = {
    "its own line": ("groups = into", 'groups = {}["oops"] or into', "KeyError", "'oops'", 10),
    "a library's line": (
        "groups = into",
        "groups = task.weight_EOI.unflatten(2, (3, -7)) or into",
        "RuntimeError",
        "",
        10,
    ),
    "an error of the system": ("shrink = 1.0", "shrink = open('/no')", "FileNotFoundError", "", 9),
}


@pytest.mark.parametrize("case", CRASHES)
def test_a_crash_is_shown_with_its_place_and_its_traceback_lies_in_a_file(
    own, tmp_path, monkeypatch, case
):
    old, new, kind, words, line = CRASHES[case]
    monkeypatch.chdir(tmp_path)
    own(old, new)
    one = trial("method=own", f"storage={tmp_path / 's'}")
    record = attempt_trial(one)
    path = f"s/trials/{one.id}/{crash.TRACEBACK}"
    place = f"{kind} at q3q_own/method.py:{line}: "
    assert record.reason.startswith(place + words)
    assert record.reason.endswith(f"; traceback: {path}")
    said = Path(path).read_text()
    assert said.startswith("Traceback (most recent call last):")
    assert f'q3q_own/method.py", line {line}, in quantize' in said
    assert f"\n{kind}: " in said
    assert place in (one.folder / "trial.log").read_text()
    assert place in trial_note(record)
    shown = listed(find_trials(tmp_path / "s"), tmp_path / "s")
    assert place in shown
    if not words:
        return
    assert path in shown
    own()
    assert attempt_trial(one).completed
    assert not Path(path).exists()


def test_a_users_mistake_has_a_line_and_no_traceback(own, tmp_path):
    own("return round_to_grid(", "return (lambda *parts, **others: parts)(")
    record = attempt_trial(trial("method=own", f"storage={tmp_path}"))
    assert not (tmp_path / "trials" / record.spec.id / crash.TRACEBACK).exists()
    assert record.reason.startswith(
        "blocks.0.qkv: what the method returned is not what would be stored: tuple is not codes"
    )


def test_secrets_are_masked_in_a_traceback(tmp_path):
    try:
        raise ValueError("http://ada:hunter2@tracker")
    except ValueError as error:
        reason = crash.crash_reason(error, tmp_path)
    assert "test_own_method.py" in reason
    assert "hunter2" not in (tmp_path / crash.TRACEBACK).read_text()


CHANGES = {
    "nothing": ("", "", False),
    "a comment": ("  # a comment", "", False),
    "a docstring": ('"""Round."""', '"""Round to nearest."""', False),
    "layout": ("shrink = 1.0", "shrink = (1.0)", False),
    "a number": ("shrink = 1.0", "shrink = 0.9", True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_code_that_changed_without_a_new_version_is_noticed(own, tmp_path, capsys, case):
    old, new, changed = CHANGES[case]
    storage = f"storage={tmp_path / 's'}"
    own()
    one = trial("method=own", "keep=blocks", storage)
    assert attempt_trial(one).completed
    own(old, new)

    config = composed("method=own", "keep=blocks", "plan=true", storage)
    facts = facts_of_trial(one)
    assert facts is not None
    assert run_study([one], {one.id: facts}, StudySettings.of(config), "", InProcess()) is None
    said = capsys.readouterr().err
    assert said.count("its code changed since 1 trial was finished, own w3 g64") == changed
    assert ("(raise version, or fresh=true)" in said) == changed
    # Nor are blocks of the old code used for a new evaluation.
    again = attempt_trial(trial("method=own", "evaluation.limit=3", storage))
    assert ("blocks_from_disk" in again.notes) == (not changed)


def test_q3qs_own_code_counts_within_one_release_and_an_old_record_says_nothing(
    tmp_path, monkeypatch
):
    record = attempt_trial(trial("method=rtn", f"storage={tmp_path}"))
    facts = record.environment["method_source"]
    assert facts["of"] == "q3q.quantize.methods.rtn"
    assert source.code_changes([record]) == []
    monkeypatch.setattr(source, "_digest_of", lambda names: "another")
    assert len(source.code_changes([record])) == 1
    for missing in ({**facts, "q3q": "another"}, {**facts, "python": "2.7"}, None):
        record.environment["method_source"] = missing
        assert source.code_changes([record]) == []
