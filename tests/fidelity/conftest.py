"""One checkpoint of each kind, and windows of tokens."""

import pytest

from tests.fidelity.checkpoints import MOE, RELATIVES, SHAPE, WIDE, save_random, windows_of


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """One checkpoint of each kind."""
    root = tmp_path_factory.mktemp("fidelity")
    kinds = {"dense": SHAPE, "moe": {**SHAPE, **MOE}}
    made = {}
    for kind, config in kinds.items():
        made[kind] = save_random(root / kind, **config)
        made[f"{kind} skewed"] = save_random(root / f"{kind}_skewed", skewed=True, **config)
        made[f"{kind} dead"] = save_random(root / f"{kind}_dead", dead=(3, 20, 41), **config)
    for kind, special in RELATIVES.items():
        made[kind] = save_random(root / kind, **{**SHAPE, **special})
    made["dense wide"] = save_random(root / "dense_wide", **WIDE)
    made["moe starved skewed"] = save_random(
        root / "moe_starved_skewed", skewed=True, starved=2, **kinds["moe"]
    )
    made["moe starved"] = save_random(root / "moe_starved", starved=2, **{**kinds["moe"], **WIDE})
    return made


@pytest.fixture(params=["dense", "moe"])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, folders):
    return folders[kind]


@pytest.fixture(scope="session")
def windows():
    return windows_of(18, 64, seed=1)


@pytest.fixture(scope="session")
def held_out():
    return windows_of(6, 64, seed=2)
