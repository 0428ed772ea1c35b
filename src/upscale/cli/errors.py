"""What a user did wrong on the command line."""

from __future__ import annotations


class UsageError(Exception):
    """A message for the user; the command ends with status 2."""
