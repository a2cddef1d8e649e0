"""Imports go down the floors and never in a circle; third-party libraries enter by their door."""

import ast
import re
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.commands import python

ROOT = Path(__file__).parent.parent
# From the ground up. A module belongs to the longest name that begins its own.
FLOORS = [
    "q3q.errors q3q.canonical q3q.number_formats q3q.scheme q3q.calibration q3q.evaluation "
    "q3q.kv_scheme q3q.bit_budget "
    "q3q.spec q3q.masking q3q.storage q3q.placement q3q.record q3q.reporter q3q.environment "
    "q3q.limits q3q.ending q3q.names q3q.quoting q3q.formatting q3q.crash",
    "q3q.numerics q3q.data q3q.team q3q.models",
    "q3q.quantize q3q.evaluate q3q.export",
    "q3q.trial q3q.loaded q3q.quantized q3q.attempt q3q.ahead",
    "q3q.sweep.machines q3q.sweep.gpus q3q.sweep.allocation q3q.sweep.shares q3q.sweep.sensing "
    "q3q.sweep.writing q3q.sweep.costs q3q.sweep.packing q3q.sweep.disk q3q.sweep.made "
    "q3q.sweep.questions q3q.sweep.plan q3q.sweep.ray q3q.sweep.background q3q.sweep.progress "
    "q3q.sweep.pace q3q.sweep.screen q3q.track",
    "q3q.config q3q.report q3q.sweep",
    "launch hydra_plugins q3q.cli q3q.fetch q3q.trials q3q.track.__main__ q3q.report.__main__",
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
SEPARATE = {"q3q.quantize", "q3q.evaluate", "q3q.export"}  # rooms that do not know each other
DOORS = {
    "ray": {"q3q.sweep.ray"},
    "mlflow": {"q3q.track"},
    "lm_eval": {"q3q.evaluate.harness"},
    "hydra": {"launch", "hydra_plugins", "q3q.cli", "q3q.fetch", "q3q.config", "q3q.sweep"},
    "matplotlib": {"q3q.report"},
    "pandas": {"q3q.report"},
    "jinja2": {"q3q.report.page"},
    "transformers": {"q3q.models", "q3q.export.gguf_vocabulary", "q3q.export.reload"},
    "compressed_tensors": {"q3q.export.compressed_tensors", "q3q.export.reload"},
    "deepspeed": {"q3q.models.sharded"},
    "gguf": {
        "q3q.models",
        "q3q.export.gguf_layout",
        "q3q.export.gguf_vocabulary",
        "q3q.export.gguf_writing",
        "q3q.export.reload",
    },
    "fsspec": {"q3q.storage.stores"},
    "huggingface_hub": {"q3q.models", "q3q.data"},
    "psutil": {"q3q.environment", "q3q.storage.claim", "q3q.sweep.ray"},
    "rich": {"q3q.sweep.screen"},
}
# torch brings triton where there is CUDA; gptqmodel loads an export where a user has installed it.
OPTIONAL = {"triton", "gptqmodel"}


def modules():
    paths = [*ROOT.glob("q3q/**/*.py"), *ROOT.glob("hydra_plugins/**/*.py"), ROOT / "launch.py"]
    for path in sorted(paths):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        # The package itself is below all others: it imports by name, when it is asked.
        if name != "q3q" and path.read_text(encoding="utf-8").strip():
            yield name, path


MODULES = dict(modules())


def room_of(module):
    rooms = [room for room in FLOOR_OF if module == room or module.startswith(room + ".")]
    return max(rooms, key=len, default=None)


@cache
def imports(name, typing_too=False):
    """Return all that a module imports, inside functions too; for type checkers alone if asked."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in typing_only and not typing_too:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            package = name.rsplit(".", node.level)[0] + "." if node.level else ""
            module = package + node.module
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def test_every_module_has_a_floor():
    assert [name for name in MODULES if room_of(name) is None] == []


def test_imports_go_down():
    wrong = []
    for name in MODULES:
        room = room_of(name)
        for imported in imports(name):
            other = room_of(imported)
            if other is None or other == room:
                continue
            if FLOOR_OF[other] > FLOOR_OF[room]:
                wrong.append(f"{name} imports {imported} from above")
            if {room, other} <= SEPARATE:
                wrong.append(f"{name} imports its neighbour {imported}")
    assert wrong == []


def test_no_imports_go_in_a_circle():
    graph = {name: imports(name, True) & MODULES.keys() - {name} for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_third_party_libraries_enter_by_their_door():
    assert [
        f"{name} imports {imported}"
        for name in MODULES
        for imported in imports(name)
        if (doors := DOORS.get(imported.partition(".")[0]))
        and not any(name == door or name.startswith(door + ".") for door in doors)
    ] == []


def written_rooms(cell):
    """Yield the modules that a cell of the written table of floors names."""
    for written in re.findall(r"`([^`]+)`", cell):
        parent, _, inner = written.removesuffix("}").partition("{")
        for name in inner.split(",") if inner else [""]:
            room = (parent + name).removesuffix(".py").rstrip("/").replace("/", ".")
            if room.startswith("python -m "):
                yield room.removeprefix("python -m ") + ".__main__"
            else:
                yield room if room in {"launch", "hydra_plugins"} else "q3q." + room


def test_the_written_table_of_floors_is_the_tested_one():
    page = (ROOT / "docs/ARCHITECTURE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| (.*) \| ?(.*) ?\|$", page, re.M)
    assert {int(floor): set(written_rooms(cell)) for floor, cell, _ in rows} == {
        floor: set(rooms.split()) for floor, rooms in enumerate(FLOORS)
    }
    assert {int(floor): DOORS.keys() & re.findall(r"\w+", cell) for floor, _, cell in rows} == {
        floor: {
            library
            for library, doors in DOORS.items()
            if floor in {FLOOR_OF[room_of(door)] for door in doors}
        }
        for floor in range(len(FLOORS))
    }


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        re.findall(r"[\w-]+", requirement)[0].lower().replace("_", "-")
        for requirement in project["dependencies"]
    }
    owners = packages_distributions()
    ours = {*sys.stdlib_module_names, *OPTIONAL, "q3q", "hydra_plugins"}
    assert [
        f"{name} imports {library}"
        for name in MODULES
        for library in {imported.partition(".")[0] for imported in imports(name)} - ours
        if not {owner.lower().replace("_", "-") for owner in owners[library]} & declared
    ] == []


# What a command imports before it knows what it does; libraries that take seconds come later.
LARGE = ("torch", "transformers", "lm_eval", "ray", "mlflow", "pandas", "matplotlib")
# (modules, what else none of them imports), from the lightest up.
LIGHT = [
    (["q3q"], ["numpy", "hydra", "q3q.spec"]),
    (["q3q.record"], ["numpy", "hydra"]),
    (["hydra_plugins.q3q"], ["jinja2"]),
    (["q3q.report.write"], ["numpy"]),
    (["launch", "q3q.config.resolve", "q3q.config.texts", "q3q.data.windows"], []),
    (["q3q.sweep.plan", "q3q.sweep.progress", "q3q.sweep.ray.cluster"], []),
    (["q3q.report.drawn", "q3q.track.mlflow", "q3q.track.tracker"], []),
]


def test_light_modules_stay_light():
    code = (
        "import sys, importlib\n"
        f"for modules, others in {LIGHT}:\n"
        "    for module in modules:\n"
        "        importlib.import_module(module)\n"
        f"        found = [name for name in [*{LARGE}, *others] if name in sys.modules]\n"
        "        assert not found, (module, found)\n"
    )
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
