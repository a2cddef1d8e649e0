"""Leave a trial that failed and one that was killed at its third block, for write_storage.sh."""

import os
import signal
from pathlib import Path

from hydra import compose, initialize_config_dir

from q3q.config import resolve as config
from q3q.trial import attempt_trial

os.environ.setdefault("TQDM_DISABLE", "1")
config.register()  # type: ignore[attr-defined]
text = Path("/home/you/garden.txt")
SMALL = [
    "storage=/srv/study",
    "evaluation.texts=[demo]",
    "evaluation.window=64",
    "evaluation.limit=4",
    "evaluation.tasks=[]",
]
SMALL += ["evaluation.drift_windows=2", "calibration.length=64", "calibration.samples=4"]


def spec(*overrides):
    with initialize_config_dir("/home/you/q3q/conf", version_base="1.3"):
        composed = compose("config", [*SMALL, *overrides])
        return config.spec_from(composed)  # type: ignore[attr-defined]


def kill(event):
    if event.phase == "quantize" and event.done == 2:
        os.kill(os.getpid(), signal.SIGKILL)


failed = spec(
    "evaluation=file", "evaluation.texts=[file]", f"evaluation.path={text}", "evaluation.window=32"
)
content = text.read_text(encoding="utf-8")
text.write_text(f"{content}One more line.\n", encoding="utf-8")
assert attempt_trial(failed).status == "FAILED"
text.write_text(content, encoding="utf-8")
stopped = spec("method=gptq", "bits=2", "skip=[*.qkv,*.gate_up,*.down]")
if os.fork() == 0:
    attempt_trial(stopped, kill)
os.wait()
