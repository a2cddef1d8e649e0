"""Everything that q3q raises on purpose. A message says what was wrong, what was given, and what to
do next."""

import re

# The words by which Python, torch's CPU allocator and CUDA's libraries say that memory ran out, the
# last two in errors of general kinds.
MEMORY_WORDS = re.compile(
    r"MemoryError|OutOfMemoryError|enforce fail at alloc_cpu"
    r"|DefaultCPUAllocator: can't allocate memory|CUDA (error: )?out of memory"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_(ALLOC|INTERNAL_ERROR_DEVICE_ALLOCATION)_FAILED"
)

# The words by which CUDA's libraries say that a GPU is gone, or failed; the last are q3q's own, for
# one that was gone before a trial began (`models.loading`).
GPU_LOST_WORDS = re.compile(
    r"no CUDA-capable device|CUDA-capable device\(s\) is/are busy or unavailable"
    r"|No CUDA GPUs are available|CUDA error: (unspecified launch failure|unknown error)"
    r"|uncorrectable (ECC|NVLink) error|(GPU|device) is lost|CUDA driver initialization failed"
    r"|cudaErrorNoDevice|\bXid\b|torch on \S+ finds no GPU"
)

# The words of faults that a broken GPU has, but wrong code too.
GPU_SUSPECT_WORDS = re.compile(
    r"device-side assert|CUDA error: (an illegal (memory access|instruction)|misaligned address"
    r"|invalid program counter|hardware stack error|the launch timed out)"
)

# Exit codes: something went wrong while running; nothing was started; Ctrl-C.
EXIT_FAILED, EXIT_MISUSED, EXIT_INTERRUPTED = 1, 2, 130


class Q3QError(Exception):
    """Base of q3q's own errors."""


class ConfigError(Q3QError):
    """A setting that cannot be right: an unknown name, a value out of range, a missing folder."""


class IncompatibleError(ConfigError):
    """Valid values that do not fit together, such as bits=1 with GPTQ.

    A grid leaves the combination out; a single trial is refused.
    """


class UnavailableError(ConfigError):
    """Weights, a text or a data set that is neither here nor available from the Hub."""


class CheckpointError(ConfigError):
    """A model folder that is missing, incomplete, damaged, or of no family that q3q runs."""


class UnavailableModelError(CheckpointError, UnavailableError):
    """A model of the Hub that is neither in the cache nor available."""


class ShapeError(Q3QError):
    """Tensors whose shapes do not fit each other or the scheme."""


class CalibrationError(ConfigError):
    """A calibration text that is missing, empty or too short."""


class UnavailableTextError(CalibrationError, UnavailableError):
    """A text of the Hub that is neither in the cache nor available."""


class NumericsError(Q3QError):
    """A computation without an honest result: non-finite weights, a matrix without a factor."""


class IntegrityError(Q3QError):
    """A trial whose own checks show that its numbers cannot be trusted."""


class ExportError(ConfigError):
    """A checkpoint that cannot be written to the given place or in the given format."""


class NotRegisteredError(Q3QError):
    """A checkpoint that was not uploaded: its files are not those that were published."""


class TrackingError(ConfigError):
    """A tracking server or store that cannot be used."""


class RefusedByTrackerError(TrackingError):
    """A record that a tracker does not take, although it works: others may be sent to it."""


class ReportError(ConfigError):
    """A report without content: no records, or a study that nobody ran."""


class SweepFailedError(Q3QError):
    """A sweep that ended with failed trials; its table and report are written."""


# What reading a torn or foreign file may raise, until its content is checked.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, Q3QError)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's words, or its kind if it has none.

    The Hub's client takes two sentences, with an address, to say that it is switched off.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")
    return "HF_HUB_OFFLINE is set" if "offline mode is enabled" in line else line
