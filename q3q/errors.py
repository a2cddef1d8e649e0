"""Everything that q3q raises on purpose. A message says what was wrong, what was given, and what to do next."""


class Q3QError(Exception):
    """Base of q3q's own errors."""


class ConfigError(Q3QError):
    """A setting that cannot be meant: an unknown name, a value out of range, a folder that is not there."""


class IncompatibleError(ConfigError):
    """Valid values that make no sense together (bits=1 with GPTQ): left out of a grid, refused when asked for alone."""


class CheckpointError(ConfigError):
    """A model folder that is missing, incomplete, damaged, or not a Qwen3."""


class ShapeError(Q3QError):
    """Tensors whose shapes do not fit each other or the scheme."""


class CalibrationError(ConfigError):
    """A calibration text that is missing, empty or too short."""


class NumericsError(Q3QError):
    """A computation that has no honest result: non-finite weights, a matrix that cannot be factored."""


class IntegrityError(Q3QError):
    """A trial whose own checks say that its numbers must not be trusted."""


class ExportError(ConfigError):
    """A checkpoint that cannot be written where or as it was asked for."""


class TrackingError(ConfigError):
    """A tracking server or store that cannot be used."""


class ReportError(ConfigError):
    """A report that has nothing to be about: no records, or a study that nobody ran."""


class SweepFailedError(Q3QError):
    """The sweep ended, its table and report are written, and some of its trials failed."""
