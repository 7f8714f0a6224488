"""Errors a user can cause, and every exit status.

`one_line_errors` prints such an error as one line, without a traceback, and exits with `FAILED`.
"""

from __future__ import annotations

import contextlib
import errno
import sys
from collections.abc import Iterator

from dho.core.environment import reports_errors

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says where a disk is full or a file may not grow."""

SUCCEEDED = 0
FAILED = 1
"""An error, or a job that failed."""
REFUSED = 3
"""A promotion or rollback that the rules or another process prevent; nothing was changed."""
NOT_STARTED = 4
"""A job that did not start in time."""
INTERRUPTED = 130
"""Ctrl-C: 128 + SIGINT, as a shell would say."""
STOPPED = 143
"""A training that was stopped by a signal: 128 + SIGTERM, as a shell would say."""


class DhoError(Exception):
    """Something the user can fix: what is wrong, where, what to do.

    Attributes:
        may_pass: whether the same call may work a while later (a server is down), so that a job in a cluster waits and
            tries again.
    """

    may_pass = False


class ConfigError(DhoError):
    """A key or value of `params.yaml` that is not allowed."""


class DataError(DhoError):
    """Images, labels or lists that cannot be used as they are."""


class StoreMismatch(DhoError):
    """A teacher store made from other data, other views or another teacher."""


class TrackingError(DhoError):
    """The MLflow server cannot be reached or refuses."""

    may_pass = True


class CheckpointError(DhoError):
    """A checkpoint that the disk cannot take."""


class ClusterError(DhoError):
    """A job that Kubernetes cannot run, or an API server that cannot be reached or refuses."""


class RemoteError(DhoError):
    """The DVC remote (S3) cannot be reached, refuses, or does not hold what is requested.

    Args:
        message: the one line.
        may_pass: whether the same request may work later.
    """

    def __init__(self, message: str, may_pass: bool = False) -> None:
        super().__init__(message)
        self.may_pass = may_pass


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn an error that the user can fix into one line on standard error and exit status `FAILED`."""
    try:
        yield
    except (DhoError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_ROOM:
            raise
        if reports_errors():
            advice = "; make room, then run it again" if isinstance(error, OSError) else ""
            print(f"dho: {error}{advice}", file=sys.stderr)
        sys.exit(FAILED)
