"""The errors a caller may want to catch. Each message gives the law, the value found and the way out."""

from __future__ import annotations


class FeatherweightError(Exception):
    """Base of every error raised on purpose by featherweight."""


class ModelError(FeatherweightError):
    """The model file or graph cannot be used as it is (corrupt, missing data, unknown node name)."""


class DataError(FeatherweightError):
    """The user's data cannot be used as it is (empty, wrong names, shapes or types, NaN)."""


class BudgetError(FeatherweightError):
    """A limit or objective is malformed or contradicts another one."""


class TechniqueError(FeatherweightError):
    """A technique cannot do what was asked of it at this site."""


class PlanError(FeatherweightError):
    """A plan file is malformed, of another version, or belongs to another model."""


class RunError(FeatherweightError):
    """The runtime refused or failed to run a model."""


class ChildCrashed(RunError):
    """The child process that ran a user's model died (signal, out of memory) or exceeded its time."""


class RemoteError(FeatherweightError):
    """Another machine cannot be reached, refuses this one, or speaks another version; never the fault of a model."""


class OutputError(FeatherweightError):
    """A result cannot be written where the user pointed (exists, not writable, disk full)."""


class MissingExtraError(FeatherweightError):
    """An optional dependency is needed; the message names the extra to install."""
