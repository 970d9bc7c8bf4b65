"""What a run says that was asked to stop; here, as the command line knows it without importing torch."""

from __future__ import annotations

__all__ = ["EXIT_STATUS", "Stopped"]

#: What a process that was asked to stop and can go on exits with: EX_TEMPFAIL of sysexits.h.
EXIT_STATUS = 75


class Stopped(Exception):
    """A run was asked to stop, and has; the message says where it can go on.

    Args:
        message: which signal, at which step.
    """
