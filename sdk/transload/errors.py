"""Every error a user can meet, in one tree.

    TransloadError
    ├── FormatError       a file is not what it claims to be; the message names file and tensor
    ├── ConfigError       the caller's arguments or configuration contradict themselves
    ├── OutputExists      the output is already there and overwriting was not asked for
    ├── Unsupported       the request is clear, and nothing here does it
    │   ├── NoBackend     no installed backend can serve the device
    │   ├── NoKernel      no kernel of the backend takes the problem; every refusal is listed
    │   └── CannotHold    the target format cannot hold these numbers; every module is listed
    ├── DoesNotFit        the model does not fit the cluster; the binding constraint in bytes
    └── BackendError      a vendor's library failed; its code and text are kept

A message says who, what was asked, what was found and what would work.
"""


class TransloadError(Exception):
    """Base of all errors that Transload raises on purpose."""


class FormatError(TransloadError):
    """A file is truncated, contradictory or not of the format it claims."""


class ConfigError(TransloadError, ValueError):
    """An argument or a configuration file contradicts itself or the model."""


class OutputExists(TransloadError):
    """The output path exists and `overwrite` was not given."""


class Unsupported(TransloadError):
    """Nothing in this installation does what was asked."""


class NoBackend(Unsupported):
    """No backend can serve the device that was asked for."""


class NoKernel(Unsupported):
    """No kernel of the backend takes the problem."""


class CannotHold(Unsupported):
    """The target cannot hold the source's numbers exactly."""


class DoesNotFit(TransloadError):
    """The model does not fit the devices."""


class BackendError(TransloadError):
    """A vendor's library failed at run time."""
