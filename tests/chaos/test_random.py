"""Workers killed at random, over and over: whatever the moment, nothing is lost and nothing is run twice.

Q3Q_CHAOS_ROUNDS says how often (2), Q3Q_CHAOS_SEED where the random numbers begin (0). A round is a sweep that is
killed now and then, a worker or the driver, and started again until it ends.
"""

import os
import random
import signal
import time

import pytest

from tests.chaos.faults import last_words, launch, log_of, numbers, records, runs, start, wait_until

ROUNDS = int(os.environ.get("Q3Q_CHAOS_ROUNDS", "2"))
SEED = int(os.environ.get("Q3Q_CHAOS_SEED", "0"))
SWEEP = ("method=rtn,gptq", "bits=2,3", "calibration.samples=16", "evaluation.limit=32")
MOST_KILLS = 4  # in a round


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    storage = tmp_path_factory.mktemp("undisturbed")
    code, output = launch(storage, tiny, *SWEEP)
    assert code == 0, output
    return {trial: numbers(record) for trial, record in records(storage).items()}


def at_work(storage):
    """(folder, process) of each trial under way."""
    found = []
    for path in storage.glob("trials/*/trial.log"):
        steps = log_of(path.parent)
        if steps and not steps[-1].words.startswith(("end", "stop")) and runs(steps[-1].pid):
            found.append((path.parent, steps[-1].pid))
    return found


@pytest.mark.slow
@pytest.mark.timeout(60 + 300 * ROUNDS)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_whatever_the_moment_of_death_nothing_is_lost(tiny, undisturbed, tmp_path, number):
    chance = random.Random(SEED + number)
    print(f"seed {SEED + number}")
    killed, code, kept = [], None, {}
    for _ in range(MOST_KILLS + 2):
        process = start(tmp_path, tiny, *SWEEP)
        while process.poll() is None and len(killed) < MOST_KILLS:
            time.sleep(chance.uniform(0.0, 1.5))
            working = at_work(tmp_path)
            if not working:
                continue
            folder, worker = chance.choice(working)
            kept |= {path: path.stat().st_mtime_ns for path in tmp_path.glob("trials/*/record.json")}
            victim = chance.choice([worker, worker, process.pid])
            os.kill(victim, signal.SIGKILL)
            wait_until(lambda victim=victim: not runs(victim), "its death", 20)
            killed.append((victim, last_words(folder, worker)))
        output, _ = process.communicate(timeout=200)
        code = process.returncode
        assert code in (0, 1, -signal.SIGKILL), output
        if code == 0:
            break
    print(killed)
    assert code == 0, output
    assert len(killed) >= 2
    assert {trial: numbers(record) for trial, record in records(tmp_path).items()} == undisturbed
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    for path in tmp_path.glob("trials/*/trial.log"):
        assert [step.words for step in log_of(path.parent)].count("end COMPLETED") <= 1
