"""The one tree of errors; each class knows the exit code the command line returns for it.

A message says what was given, what is allowed and what to do next, with names and numbers.
"""

from __future__ import annotations


class TriviumError(Exception):
    """Any foreseeable failure. The command line exits with ``exit_code``."""

    exit_code: int = 1


class ConfigError(TriviumError):
    """A usage or configuration error: wrong key, type, range or combination."""

    exit_code = 2


class SetupError(TriviumError):
    """The environment is not as needed: ranks, ports, devices, missing extras."""

    exit_code = 3


class CapacityError(TriviumError):
    """What was asked for does not fit in the memory or on the disk that is there."""

    exit_code = 4


class CheckpointError(TriviumError):
    """A checkpoint is missing, incomplete, altered or of another model."""

    exit_code = 5


class DataError(TriviumError):
    """Input text, tokens or rows that cannot be used; names the file and the place."""


class MismatchError(TriviumError):
    """Ranks disagree on the model, the shapes or the phase they are in; names both."""


class RankError(TriviumError):
    """A rank died or fell silent; names it and what it was doing."""


class NonFiniteError(TriviumError):
    """A loss or gradient is NaN or infinite and the policy is to stop."""
