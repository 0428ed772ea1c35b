"""What the documentation site changes in its pages."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name things as Sphinx does; the site shows the name alone."""
    return _ROLE.sub("", html)
