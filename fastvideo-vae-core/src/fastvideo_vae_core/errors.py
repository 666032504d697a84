"""Every error that the packages raise on purpose. Messages are one line: what was wanted, what came, and a way out."""


class VAEError(Exception):
    """Base of all errors below; the command line prints it without a traceback."""


class ShapeError(VAEError, ValueError):
    """A tensor has a shape that the architecture cannot take."""


class ConfigError(VAEError, ValueError):
    """A configuration is unknown, contradictory or out of bounds."""


class CheckpointError(VAEError):
    """A checkpoint cannot be read, is not recognised, or does not fit the model."""


class FamilyError(VAEError, LookupError):
    """A family or class name is unknown, claimed twice, or its package fails to import."""


class MemoryBudgetError(VAEError, MemoryError):
    """No plan fits the memory budget."""


class ShardError(VAEError, RuntimeError):
    """A rank that computes a call together with others failed, was lost, or did not answer in time."""


class MediaError(VAEError):
    """A media or latent file cannot be read or written."""
