"""`python -m q3q.trials`: list, resume, delete and verify trials of a storage; watch a sweep."""

import argparse
import sys
from collections.abc import Sequence

from q3q.ending import end_well, own_exit_code
from q3q.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISUSED, Q3QError, SweepFailedError
from q3q.masking import masked
from q3q.storage.mirror import mirror_at, refreshed
from q3q.trials.attach import watch
from q3q.trials.delete import delete_trials
from q3q.trials.resume import resume_trials
from q3q.trials.stored import STATES, chosen, find_trials, listed
from q3q.trials.verify import fetch_exports, verified


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m q3q.trials", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--storage",
        default="mlruns",
        metavar="DIR",
        help="the storage, a folder or a URL; default: mlruns",
    )
    verbs = parser.add_subparsers(
        dest="verb", metavar="list | resume | delete | attach | verify", title="what to do"
    )
    listing = verbs.add_parser(
        "list", help="every trial: state, size on disk, what it waits for (the default)"
    )
    listing.add_argument(
        "state", nargs="*", choices=[*STATES, []], help="only trials in these states"
    )
    resume = verbs.add_parser(
        "resume", help="continue trials in this process, from the block where they stopped"
    )
    resume.add_argument("which", nargs="+", metavar="ID|failed|stopped")
    delete = verbs.add_parser(
        "delete", help="delete trials' files from disk; their runs in MLflow stay"
    )
    delete.add_argument("which", nargs="+", metavar="ID|failed|stopped|unknown")
    attach = verbs.add_parser(
        "attach", help="watch a sweep that runs in another terminal or on another machine"
    )
    attach.add_argument("sweep", nargs="?", help="its name; default: the one that is running")
    verify = verbs.add_parser(
        "verify", help="read every byte of records, their files and exports, and report damage"
    )
    verify.add_argument("which", nargs="*", metavar="ID", help="default: all trials")
    options = parser.parse_args(arguments)
    try:
        storage = refreshed(options.storage)
        if options.verb == "attach":
            return watch(storage, options.sweep, mirror_at(options.storage))
        trials = find_trials(storage, options.storage)
        if options.verb == "verify":
            which = chosen(trials, options.which, ()) if options.which else trials
            fetch_exports(options.storage)
            report = verified(which, storage, alone=bool(options.which))
            print(report.text)
            return EXIT_FAILED if report.faults else 0
        if options.verb == "resume":
            resume_trials(chosen(trials, options.which, ("failed", "stopped")), options.storage)
        elif options.verb == "delete":
            which = chosen(trials, options.which, ("failed", "stopped", "unknown"))
            delete_trials(which, trials, options.storage, print)
        else:
            states = getattr(options, "state", None) or STATES
            shown = [trial for trial in trials if trial.state in states]
            print(listed(shown, options.storage, storage))
    except Q3QError as error:
        print(f"q3q: {masked(str(error))}", file=sys.stderr)
        return EXIT_FAILED if isinstance(error, SweepFailedError) else EXIT_MISUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    end_well()
    with own_exit_code():
        sys.exit(main())
