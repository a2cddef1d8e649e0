"""Processes are killed at random moments: nothing is lost and nothing is run twice.

Q3Q_CHAOS_ROUNDS is the number of rounds (4), Q3Q_CHAOS_SEED the seed (0). A round is a sweep, every
other one of gangs of two, whose driver, workers and ranks are killed or terminated now and then; it
is started again until it ends.
"""

import os
import random
import signal
import time
from functools import partial
from typing import Any

import pytest

from tests.chaos.faults import last_words, launch, log_of, numbers, records, runs, start, wait_until

ROUNDS = int(os.environ.get("Q3Q_CHAOS_ROUNDS", "4"))
SEED = int(os.environ.get("Q3Q_CHAOS_SEED", "0"))
SWEEP = ("method=rtn,gptq", "bits=2,3", "calibration.samples=16", "evaluation.limit=32")
GANGS = ("cluster.ranks_per_trial=2", "cluster.cpus_per_trial=1")
MOST_KILLS = 4  # in a round


def is_dead(pid: int) -> bool:
    return not runs(pid)


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    storage = tmp_path_factory.mktemp("undisturbed")
    code, output = launch(storage, tiny, *SWEEP)
    assert code == 0, output
    return {trial: numbers(record) for trial, record in records(storage).items()}


def at_work(storage):
    """(folder, process) of each trial under way, or of each rank of a gang's."""
    found = []
    for path in storage.glob("trials/*/trial.log"):
        steps = log_of(path.parent)
        last = {step.pid: step.words for step in steps}  # that each process said
        if steps and not steps[-1].words.startswith(("end", "stop")):
            found += [
                (path.parent, pid)
                for pid, words in last.items()
                if runs(pid) and "end " not in words
            ]
    return found


@pytest.mark.slow
@pytest.mark.timeout(60 + 300 * ROUNDS)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_whatever_the_moment_of_death_nothing_is_lost(tiny, undisturbed, tmp_path, number):
    chance = random.Random(SEED + number)
    print(f"seed {SEED + number}")
    killed: list[tuple[int, str, str]] = []
    kept: dict[str, Any] = {}
    code = None
    sweep = SWEEP + (GANGS if number % 2 else ())
    for _ in range(MOST_KILLS + 2):
        process = start(tmp_path, tiny, *sweep)
        while process.poll() is None and len(killed) < MOST_KILLS:
            time.sleep(chance.uniform(0.0, 1.5))
            working = at_work(tmp_path)
            if not working:
                continue
            folder, worker = chance.choice(working)
            kept = {
                trial: record["environment"]["ended"] for trial, record in records(tmp_path).items()
            } | kept
            victim = chance.choice([worker, worker, process.pid])
            how = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
            said = last_words(folder, worker)
            os.kill(victim, how)
            if how == signal.SIGKILL:
                wait_until(partial(is_dead, victim), "its death", 20)
                said = last_words(folder, worker)  # where it died
            killed.append((victim, how.name, said))
        output, _ = process.communicate(timeout=200)
        code = process.returncode
        # -SIGTERM: the driver was still importing, does not listen yet, and had done nothing
        early = code == -signal.SIGTERM and not output
        assert early or code in (0, 1, -signal.SIGKILL, 128 + signal.SIGTERM), output
        if code == 0:
            break
    print(killed)
    assert code == 0, output
    assert len(killed) >= 2
    found = records(tmp_path)
    assert {trial: numbers(record) for trial, record in found.items()} == undisturbed
    assert {trial: found[trial]["environment"]["ended"] for trial in kept} == kept
    for path in tmp_path.glob("trials/*/trial.log"):
        assert [step.words for step in log_of(path.parent)].count("end COMPLETED") <= 1
