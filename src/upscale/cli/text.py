"""Help texts, written as paragraphs in the source and shown at any width."""

from __future__ import annotations

from rich.markup import escape


def for_help(text: str) -> str:
    """Paragraphs on one line each, for the terminal to break; lines that begin with a blank stay as they are."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines: list[str] = []
        for line in paragraph.splitlines():
            if lines and not line.startswith(" ") and not lines[-1].startswith(" "):
                lines[-1] += f" {line}"
            else:
                lines.append(line)
        paragraphs.append("\n".join(lines))
    return escape("\n\n".join(paragraphs))
