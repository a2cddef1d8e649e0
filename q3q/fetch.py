"""`python -m q3q.fetch`: download all that a command line of launch.py will need, and run nothing.

It takes launch.py's arguments: python -m q3q.fetch -m model=qwen3_8b method=gptq bits=2,3. Weights,
texts and data sets go into the caches that launch.py reads. So you can run it on a machine with a
network before trials run on one without. Files that are already there are not downloaded again.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence

os.environ.setdefault("TQDM_DISABLE", "1")  # q3q shows its own progress

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from q3q.cli import explain
from q3q.config.arguments import understood
from q3q.config.guard import refuse_code
from q3q.config.needs import AnyNeed, needs_of, union
from q3q.config.pages import CONF
from q3q.config.schema import register
from q3q.config.words import split
from q3q.data.needs import downloading
from q3q.ending import end_well
from q3q.errors import EXIT_INTERRUPTED, EXIT_MISUSED, Q3QError
from q3q.formatting import bytes_in_words, plural
from q3q.masking import masked
from q3q.sweep.jobs import composed_jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m q3q.fetch",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [--list] ARGUMENTS OF launch.py",
    )
    parser.add_argument("--list", action="store_true", help="list with sizes, download nothing")
    options, words = parser.parse_known_args(arguments)
    try:
        needs = union(need for config in configs_of(words) for need in needs_of(config))
        if not needs:
            print("Nothing to fetch: this command needs only what ships with q3q, or local files")
        return listed(needs) if options.list else fetched(needs)
    except KeyboardInterrupt:
        print("Interrupted; the same command continues", file=sys.stderr)
        return EXIT_INTERRUPTED
    except (Q3QError, HydraException, OmegaConfBaseException, OSError) as error:
        return explain(error)


def configs_of(words: Sequence[str]) -> Iterator[DictConfig]:
    """Yield the composed config of each job that launch.py would make of these words.

    Raises:
        ConfigError: launch.py would refuse the words.
    """
    register()
    arguments = understood(words)
    refuse_code(arguments)
    line = split(arguments)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), job_name="fetch", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        if not line.sweeps:
            yield loader.load_configuration("config", line.words, RunMode.RUN)
            return
        config = loader.load_configuration("config", line.words, RunMode.MULTIRUN)
        sweeper = config.hydra.sweeper
        jobs = composed_jobs(
            loader,
            config,
            sweeper.params or {},
            sweeper.rows or [{}],
            list(config.hydra.overrides.task),
        )
        for job in jobs:
            yield job.config


def listed(needs: Sequence[AnyNeed]) -> int:
    """Print each need with the bytes to download; return the exit code."""
    total, lost = 0, 0
    for need in needs:
        try:
            missing = need.missing()
        except Q3QError as error:
            lost += 1
            _refuse(need, error)
            continue
        total += missing or 0
        if missing is None:
            size = "its size is known when it is fetched"
        else:
            size = f"{bytes_in_words(missing)} to download" if missing else "is here"
        print(f"{need.name}: {size}")
    if total or not lost:
        print(f"{bytes_in_words(total)} to download" if total else "Nothing to download")
    return _ended(lost)


def fetched(needs: Sequence[AnyNeed]) -> int:
    """Download each need; return the exit code. One that fails does not stop the others."""
    failed = 0
    for need in needs:
        said: list[str] = []

        def say(line: str, said: list[str] = said) -> None:
            said.append(line)
            print(line, flush=True)

        try:
            need.fetch(downloading(need.name, say, time.monotonic))
        except Q3QError as error:
            failed += 1
            _refuse(need, error)
        else:
            if not said:
                say(f"{need.name}: is here")
    return _ended(failed)


def _refuse(need: AnyNeed, error: Exception) -> None:
    print(f"q3q: {need.name}: {masked(str(error))}", file=sys.stderr)


def _ended(lost: int) -> int:
    if lost:
        print(f"q3q: {plural(lost, 'thing')} not available", file=sys.stderr)
    return EXIT_MISUSED if lost else 0


if __name__ == "__main__":
    end_well()
    sys.exit(main())
