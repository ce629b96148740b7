"""The errors that this package raises on purpose, all children of `PifaError`.

Each message says what was wanted, what came, and what to do about it.
"""


class PifaError(Exception):
    """Anything that this package refuses; catch this to catch them all."""


class ConfigError(PifaError, ValueError):
    """An option is outside its range, unknown, or matches nothing."""


class RankError(PifaError, ValueError):
    """A weight cannot be factorized at the rank or density asked for."""


class WeightError(PifaError, RuntimeError):
    """A dense weight that is put together from its factors was written to; the factors are what can be changed."""


class CaptureError(PifaError):
    """A model could not be captured as one graph of tensor operations."""


class CalibrationError(PifaError):
    """The calibration batches cannot be used: none, too short, of mixed shapes, or not finite."""


class DerivativeError(CalibrationError):
    """A captured model holds an operation that cannot be differentiated."""


class DataError(PifaError):
    """A text source is missing, unreadable, empty or too short."""


class CheckpointError(PifaError):
    """A saved model is missing, damaged, of an unknown format, or would overwrite something."""


class OffloadError(PifaError):
    """A long run cannot go on: too little memory for its plan, or a working folder that is full, damaged or in use."""


class CacheError(PifaError, OSError):
    """There is no place to keep what is built or fetched."""


class ProcessError(PifaError):
    """One of several processes that share a run cannot be reached, or is gone."""


class DeviceError(PifaError, ValueError):
    """A device is unknown, not there, or has too little memory."""


class PassError(PifaError):
    """A pass skipped a node under `strict=True`."""


class ExportError(PifaError):
    """A model cannot be written in the format asked for."""


class BenchError(PifaError):
    """A benchmark's variants compute different things, or its file of rows does not fit what would be appended."""
