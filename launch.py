"""The front door: `python launch.py -m method=gptq,awq bits=2,3,4`."""

import os
import sys

os.environ.setdefault("TQDM_DISABLE", "1")  # q3q shows its own progress
os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here whole, and leave in one line

import hydra
from omegaconf import DictConfig

from q3q.cli import explain, program_version, run_alone
from q3q.config.arguments import understood
from q3q.config.guard import refuse_code
from q3q.config.help import shows_settings
from q3q.config.schema import register
from q3q.ending import end_well, own_exit_code


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> object:
    try:
        return run_alone(config)
    except Exception as error:
        sys.exit(explain(error))  # not raised: Hydra would print a second line about it


def command(arguments: list[str]) -> None:
    """Do what a command line asks for."""
    if arguments == ["--version"]:
        print(program_version())
        return
    sys.argv[1:] = understood(arguments)
    refuse_code(sys.argv[1:])
    if not shows_settings(sys.argv[1:], main):
        main()


if __name__ == "__main__":
    end_well()
    with own_exit_code():
        register()
        try:
            command(sys.argv[1:])
            sys.stdout.flush()  # here, where an error still has an answer
        except KeyboardInterrupt:
            sys.exit(130)
        except Exception as error:
            sys.exit(explain(error))
