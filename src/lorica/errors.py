"""Every error that a user can cause, as one tree. Each is also the standard type that it refines.

A message is one line: the condition, the key and the value given, and the way out. The command line prints it
without a traceback and exits with `exit_code`.
"""

from __future__ import annotations


class LoricaError(Exception):
    """Root of the tree; catch it to catch every mistake that is not a bug of lorica."""

    exit_code = 2

    def __str__(self) -> str:  # KeyError's own __str__ would print the message in quotes
        return str(self.args[0]) if self.args else type(self).__name__


class ConfigError(LoricaError, ValueError):
    """A config, flag or option that cannot be used as given."""


class UnknownNameError(ConfigError, KeyError):
    """A name that is not in its catalogue or schema."""


class MissingPathError(LoricaError, FileNotFoundError):
    """A file or folder that is not there, or is not of the kind expected."""


class OutputExistsError(LoricaError, FileExistsError):
    """The output folder already holds something, and nothing is written over."""


class DataError(LoricaError, ValueError):
    """A task's data does not have the columns, labels or rows that it must have."""


class AdapterFormatError(LoricaError, ValueError):
    """An adapter folder that cannot be read, or is not safe to read."""


class ShapeError(LoricaError, ValueError):
    """Factors, updates or modules whose shapes or ranks do not fit."""


class TargetError(LoricaError, LookupError):
    """target_modules that match nothing in the model."""


class ModelError(LoricaError, ValueError):
    """A base model that cannot be loaded, or cannot do what is asked of it."""


class NonFiniteLossError(LoricaError, ArithmeticError):
    """The loss is NaN or infinite too often to go on."""


class DriftError(LoricaError, ArithmeticError):
    """The processes of one run do not hold the same parameters."""


class LostProcessError(LoricaError, ConnectionError):
    """Another process of the run has ended, and its own message says why."""


class MissingExtraError(LoricaError, ImportError):
    """An optional library is needed and not installed."""


class ResumeError(LoricaError, ValueError):
    """A checkpoint that was made with another config, other data or another base model."""


class FolderInUseError(LoricaError, BlockingIOError):
    """Another process is working in the run folder."""

    exit_code = 75


class InterruptedRunError(LoricaError, InterruptedError):
    """A signal stopped the run; its state has been saved."""

    def __init__(self, message: str, signal: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = 128 + (signal or 0)
