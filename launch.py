"""The front door: `python launch.py -m method=gptq,awq bits=2,3,4`."""

import os
import sys

os.environ.setdefault("TQDM_DISABLE", "1")  # q3q shows its own progress
os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come here whole, and leave in one line

import hydra
from omegaconf import DictConfig

from q3q.cli import explain, run_alone
from q3q.config.guard import refuse_code
from q3q.config.schema import register, with_plain_keys
from q3q.ending import end_well


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> object:
    try:
        return run_alone(config)
    except Exception as error:
        sys.exit(explain(error))  # not raised: Hydra would print a second line about it


if __name__ == "__main__":
    end_well()
    register()
    sys.argv[1:] = [with_plain_keys(argument) for argument in sys.argv[1:]]
    try:
        refuse_code(sys.argv[1:])
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(explain(error))
