"""The report's page in a real browser: nothing sticks out, nothing is complained of, both colour schemes are readable.

Skipped where there is no Chromium.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from support.pages import Page
from test_report import HOSTILE, barred
from upscale.plan import Plan, Port, Space, SpaceReader
from upscale.report import LayerRow, Report
from upscale.reporting import render_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)
WIDTHS = (400, 1600)
#: Added to a copy of the page: what a browser makes of it.
PROBE = """<script>
parent.seen.push({
  inner: innerWidth, scroll: document.documentElement.scrollWidth,
  dark: matchMedia("(prefers-color-scheme: dark)").matches,
  paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  shown: [...document.querySelectorAll("h2")].filter(e => e.getBoundingClientRect().height > 0).length,
  pictures: [...document.querySelectorAll(".space[open] figure svg")].map(e => e.getBoundingClientRect())
    .map(r => [Math.round(r.width), Math.round(r.height)]),
  rows: [...document.querySelectorAll(".space[open] .matrix")].slice(0, 3).map(m => [
    ...[...m.querySelectorAll(".numbers span")].map(e => e.getBoundingClientRect().top),
    ...[...m.querySelectorAll(".readers tbody tr")].map(e => e.getBoundingClientRect().top)]),
});
</script></body>"""
#: Frames, because a window is at least 500 pixels wide.
FRAMES = """<!DOCTYPE html><html>
<head><meta name="color-scheme" content="light dark"><script>var seen = [];</script></head>
<body onload="document.title = JSON.stringify(seen)">{}</body></html>"""


def demanding() -> Report:
    """Names without a place to break, many lanes, many readers, a wide space."""
    long = "module_with_an_endless_name." * 6 + "conv"
    spaces = tuple(
        Space(
            f"{long}{number}",
            2048,
            tuple(range(2000, -1, -1)),
            (Port("p", long, number),) * 12,
            tuple(
                SpaceReader(f"r{i}", f"{long}{i}", 100 + i, "t", ("r", "t"), tuple(range(i, 2000, 2)))
                for i in range(15)
            ),
        )
        for number in range(15)
    )
    row = LayerRow(
        long, "conv_transpose2d", (2048, 2000), (123456, 98765), (10**12, 10**11), (10**13, 10**12), "collect"
    )
    names = {"reads": {"gather": 3, HOSTILE: 2}, "kept": ((long, "input", 12, long),), "notes": (long,)}
    where = f"model (Net, /a/very/long/path/{'folder/' * 30}net.py:12: {'x' * 200})"
    extra: dict[str, Any] = {**names, "layers": (row,) * 5, "barriers": ((where, "aten.cumsum.default", long),)}
    plan = Plan("auto", spaces=spaces)
    return replace(Report((10**12, 1), (3, 2), (), {}, (), (), (), (long,), {}, plan=plan), **extra)


def looked_at(source: str, dark: bool, folder: Path) -> list[dict[str, Any]]:
    """What the probe says of a page at each width; fails on anything that the browser complains of."""
    probed = html.escape(source.replace("</body>", PROBE))
    frames = "".join(f'<iframe style="border:0;width:{w}px;height:900px" srcdoc="{probed}"></iframe>' for w in WIDTHS)
    path = folder / "page.html"
    path.write_text(FRAMES.format(frames), encoding="utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command = [CHROMIUM, *FLAGS, scheme, "--window-size=1700,900", f"--user-data-dir={folder / 'profile'}"]
    ran = subprocess.run(
        [*map(str, command), "--dump-dom", path.as_uri()], capture_output=True, text=True, check=True, timeout=120
    )
    assert "CONSOLE" not in ran.stderr, ran.stderr
    (title,) = re.findall(r"<title>(\[.*?)</title>", ran.stdout)[:1]
    seen = sorted(json.loads(html.unescape(title)), key=lambda found: found["inner"])
    assert [found["inner"] for found in seen] == list(WIDTHS)
    return seen


def brightness(colour: str) -> int:
    """Of "rgb(15, 20, 25)"."""
    return sum(map(int, re.findall(r"\d+", colour)))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
@pytest.mark.parametrize("make", [demanding, barred])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_nothing_sticks_out(make: Callable[[], Report], dark: bool, tmp_path: Path) -> None:
    source = render_page(make(), {"a" * 300: 1e6, "pruned": 0.1})
    for width, seen in zip(WIDTHS, looked_at(source, dark, tmp_path), strict=True):
        assert seen["dark"] == dark == (brightness(seen["paper"]) < brightness(seen["ink"]))
        assert seen["scroll"] <= width
        assert seen["shown"] == len(Page(source).having("h2"))
        assert seen["pictures"] and all(wide > 60 and tall >= 17 for wide, tall in seen["pictures"])
        for tops in seen["rows"] if width == 1600 else ():  # a reader's line stands beside its row of the picture
            half = len(tops) // 2
            assert all(abs(a - b) < 4 for a, b in zip(tops[:half], tops[half:], strict=True))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH")
def test_the_probe_sees_what_sticks_out_and_what_is_complained_of(tmp_path: Path) -> None:
    wide = "<html><body><p style='width:3000px'>x</p></body></html>"
    assert looked_at(wide, False, tmp_path)[0]["scroll"] > 400
    with pytest.raises(AssertionError, match="CONSOLE"):
        looked_at("<html><body><script>undefined_name()</script></body></html>", False, tmp_path)


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_can_be_told_apart() -> None:
    """Contrast by WCAG 2.2: 4.5 for text, 3 for what a picture shows."""
    source = render_page(Report((1, 1), (1, 1), (), {}, (), (), (), (), {}))
    schemes = [
        dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block)) for block in source.split("prefers-color-scheme")[:2]
    ]
    assert len(schemes) == 2
    for colours in schemes:
        light = {name: _luminance(colour) for name, colour in colours.items()}

        def contrast(one: str, other: str, light: dict[str, float] = light) -> float:
            low, high = sorted((light[one], light[other]))
            return (high + 0.05) / (low + 0.05)

        for ground in ("paper", "sheet"):
            assert min(contrast(name, ground) for name in ("ink", "soft", "blue", "orange")) >= 4.5
        assert min(contrast("lane", "paper"), contrast("blue", "track"), contrast("orange", "track")) >= 3
