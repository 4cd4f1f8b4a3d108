"""The errors that microglia raises on purpose.

Every message is one sentence that says what was given, what is allowed and what to do. Whoever wants to catch all of
them catches `MicrogliaError`; anything else that escapes is a bug of ours.
"""


class MicrogliaError(Exception):
    """Parent of every error that microglia raises on purpose."""


class UnsupportedModelError(MicrogliaError):
    """The model has a shape, a family or an option (softcap, say) that heads cannot be pruned in yet."""


class CheckpointError(MicrogliaError):
    """A saved checkpoint is missing, damaged or belongs to another model."""


class ConfigError(MicrogliaError, ValueError):
    """An argument or option has a value that is not allowed. Also a ValueError, as Python's callers expect."""


class DataError(MicrogliaError):
    """Examples, records or measurements are missing, malformed or too few for what was asked of them."""
