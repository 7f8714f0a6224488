"""Errors a user can cause. The command line prints them as one line and exits with 1, without a traceback."""


class DhoError(Exception):
    """Something the user can mend: what is wrong, where, what to do."""


class ConfigError(DhoError):
    """A key or value of `params.yaml` that is not allowed."""


class DataError(DhoError):
    """Images, labels or lists that cannot be used as they are."""


class StoreMismatch(DhoError):
    """A teacher store that was made from other data, other views or another teacher."""


class TrackingError(DhoError):
    """The MLflow server cannot be reached or refuses."""
