"""The command ``upscale``. It needs the extra ``cli``; the library itself does not."""

from __future__ import annotations

import importlib
import sys

_NEEDED = ("typer", "psutil")


def main() -> int:
    """Run the command line; the exit status. 2 where it was used wrongly, or lacks a package."""
    missing = [package for package in _NEEDED if not _there(package)]
    if missing:
        print(f"upscale needs {' and '.join(missing)}: pip install 'upscale-pruning[cli]'", file=sys.stderr)
        return 2
    from .app import run

    return run(sys.argv[1:])


def _there(package: str) -> bool:
    try:
        importlib.import_module(package)
    except ImportError:
        return False
    return True
