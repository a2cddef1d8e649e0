"""Imports go down the floors only, and third-party libraries enter by their door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# room -> floor; a module belongs to the longest name that begins its own.
FLOORS = {
    "launch": 5,
    "hydra_plugins": 5,
    "q3q.front": 5,
    "q3q.boundary": 5,
    "q3q.trials": 5,
    "q3q.config": 5,
    "q3q.patterns": 5,
    "q3q.sweep.sweeper": 5,
    "q3q.sweep.launcher": 5,
    "q3q.sweep.study": 5,
    "q3q.report": 5,
    "q3q.sweep.plan": 4,
    "q3q.sweep.costs": 4,
    "q3q.sweep.teller": 4,
    "q3q.sweep.cluster": 4,
    "q3q.sweep.progress": 4,
    "q3q.sweep.bulletin": 4,
    "q3q.track": 4,
    "q3q.track.__main__": 5,
    "q3q.trial": 3,
    "q3q.attempt": 3,
    "q3q.calibrate": 2,
    "q3q.quantize": 2,
    "q3q.evaluate": 2,
    "q3q.export": 2,
    "q3q.models": 1,
    "q3q.data": 1,
    "q3q.team": 1,
    "q3q.numerics": 1,
    "q3q.environment": 0,
    "q3q.spec": 0,
    "q3q.record": 0,
    "q3q.errors": 0,
    "q3q.masking": 0,
    "q3q.claim": 0,
    "q3q.mirror": 0,
}
# Rooms of floor 2 do not know each other, with what DESIGN allows.
SAME_FLOOR_ALLOWED = {("q3q.quantize", "q3q.calibrate.statistics")}
DOORS = {
    "ray": {"q3q.sweep.cluster"},
    "mlflow": {"q3q.track.mlflow"},
    "lm_eval": {"q3q.evaluate.harness"},
    "hydra": {
        "launch",
        "hydra_plugins",
        "q3q.boundary",
        "q3q.front",
        "q3q.config",
        "q3q.sweep.sweeper",
        "q3q.sweep.launcher",
    },
    "matplotlib": {"q3q.report"},
    "pandas": {"q3q.report"},
    "transformers": {"q3q.models", "q3q.export.reload"},
    "compressed_tensors": {"q3q.export.compressed_tensors", "q3q.export.reload"},
    "deepspeed": {"q3q.models.sharded"},
    "fsspec": {"q3q.mirror"},
}


def modules():
    for path in sorted(
        [*ROOT.glob("q3q/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py"), ROOT / "launch.py"]
    ):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name not in ("q3q", "q3q.sweep", "q3q.evaluate.tasks.story_questions"):
            yield name, path


def room(module):
    fitting = [known for known in FLOORS if module == known or module.startswith(known + ".")]
    return max(fitting, key=len, default=None)


def imports(path):
    """Every module imported anywhere in the file, also inside functions; under TYPE_CHECKING nothing runs."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize(
    ("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_imports_go_down(name, path):
    mine = room(name)
    assert mine is not None, f"{name} has no floor"
    for imported in imports(path):
        theirs = room(imported)
        if theirs is None or theirs == mine:
            continue
        assert FLOORS[theirs] <= FLOORS[mine], f"{name} imports {imported} from above"
        if FLOORS[theirs] == FLOORS[mine] == 2:
            allowed = any(mine == a and imported.startswith(b) for a, b in SAME_FLOOR_ALLOWED)
            assert allowed, f"{name} imports its neighbour {imported}"


@pytest.mark.parametrize(
    ("name", "path"), modules(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_third_party_libraries_enter_by_their_door(name, path):
    for imported in imports(path):
        library = imported.partition(".")[0]
        if library in DOORS:
            assert any(name == door or name.startswith(door + ".") for door in DOORS[library]), (
                f"{name}: {imported}"
            )


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("q3q.record", ["torch", "numpy", "ray", "mlflow", "hydra"]),
        ("q3q.config", ["torch", "ray", "mlflow", "transformers"]),
        ("hydra_plugins.q3q", ["torch", "ray", "mlflow", "pandas", "matplotlib", "transformers"]),
    ],
)
def test_light_modules_stay_light(module, unwanted):
    code = f"import sys, {module}; print([m for m in {unwanted} if m in sys.modules])"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "[]"
