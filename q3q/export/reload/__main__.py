"""Begin the other process: these modules under a name of their own, as q3q cannot be imported."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

FOLDER = Path(__file__).parent
NAME = "reload"

spec = spec_from_file_location(
    NAME, FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
)
assert spec is not None
sys.modules[NAME] = module_from_spec(spec)
import_module(f"{NAME}.script").begin()
