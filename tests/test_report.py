"""The report for machines, for notebooks and as a page."""

from __future__ import annotations

import builtins
import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import upscale
from support.pages import Page, painted
from support.subjects import SmallResNet, image, masked
from support.vision import build
from test_spaces import IMAGE, columns, zeroed
from upscale.errors import InputError
from upscale.plan import Plan, Port, Space, SpaceReader
from upscale.report import LayerRow, Report
from upscale.reporting import render_page, write_page
from upscale.reporting.numbers import change, microseconds, short

HOSTILE = "</style><script>alert('x')</script>&\"'<img src=https://evil.example/x>"


class Barred(nn.Module):
    """A sum whose running total along the channels no flow rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 8, 1), nn.Conv2d(12, 8, 1)
        self.d = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Two readers of one tensor, a barrier, a layer."""
        y = torch.relu(self.a(x))
        return self.d(torch.cumsum(self.b(y) + self.c(y), dim=1))


def barred() -> Report:
    torch.manual_seed(0)
    model = Barred().eval()
    with torch.no_grad():
        model.b.weight[:, ::3] = 0
        model.c.weight[:, ::2] = 0
    return upscale.export(model, (IMAGE,)).report


def residual() -> Report:
    return upscale.export(masked(SmallResNet()), (image(),)).report


@pytest.fixture(scope="module", params=[barred, residual])
def report(request: pytest.FixtureRequest) -> Report:
    return request.param()


def attributes(page: Page) -> str:
    return " ".join(value for _, found in page.tags for value in found.values())


# -- machines ---------------------------------------------------------------------------------------------------------


def test_json_holds_the_report(report: Report) -> None:
    data = json.loads(report.to_json())
    assert (data["format"], data["version"]) == ("upscale-report", 1)
    assert tuple(data["parameters"].values()) == report.parameters and tuple(data["flops"].values()) == report.flops
    assert {r["kind"]: r["count"] for r in data["reads"]} == report.reads
    every = [r for by in report.plan.reads.values() for r in by.values()]  # type: ignore[union-attr]
    assert sum(r["nanoseconds"] for r in data["reads"]) == pytest.approx(sum(r.nanoseconds for r in every))
    assert [row["name"] for row in data["layers"]] == [row.name for row in report.layers]
    assert [tuple(b.values()) for b in data["barriers"]] == list(report.barriers)
    assert [tuple(k.values()) for k in data["kept"]] == list(report.kept)
    assert data["verification"] == {"error": report.error, "batches": list(report.batches)}
    assert data["seconds"] == report.seconds and set(data["seconds"]) >= {"capture", "flow", "plan"}
    assert [s["name"] for s in data["spaces"]] == [s.name for s in report.plan.spaces]  # type: ignore[union-attr]
    assert len(data["orders"]) == len(report.plan.orders)  # type: ignore[union-attr]


def test_json_of_odd_reports_is_json(report: Report) -> None:
    odd = replace(report, plan=None, error=float("nan"))
    data = json.loads(odd.to_json(), parse_constant=pytest.fail)
    assert data["mode"] is None and data["spaces"] == [] and data["verification"]["error"] is None
    assert {r["nanoseconds"] for r in data["reads"]} == {None}
    assert json.loads(replace(report, error=None).to_json())["verification"] is None


def test_to_dict_is_what_it_was(report: Report) -> None:
    data = report.to_dict()
    names = "parameters flops layers reads barriers notes kept removed seconds error batches"
    assert sorted(data) == sorted(names.split())
    assert data["layers"][0]["name"] == report.layers[0].name


# -- notebooks --------------------------------------------------------------------------------------------------------


def test_a_notebook_shows_a_small_escaped_table(report: Report) -> None:
    cell = report._repr_html_()
    page = Page(cell)
    assert len(cell) < 20_000 and all(row.name in page.text for row in report.layers)
    assert not page.having("script") and not page.having("style")
    assert "jinja2" not in cell
    rows = tuple(replace(row, name=HOSTILE) for row in report.layers)
    bad = replace(report, layers=rows, barriers=((HOSTILE, HOSTILE, HOSTILE),) * 50, notes=(HOSTILE,))
    page = Page(bad._repr_html_())
    assert HOSTILE in page.text and not page.having("script") and not page.having("img")
    many = Page(replace(report, layers=report.layers * 100)._repr_html_())
    assert f"and {len(report.layers) * 100 - 200} more" in many.text


# -- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_holds_everything(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report.to_html(path, latency={"dense": 12.5, "pruned": 8.25})
    source = path.read_text(encoding="utf-8")
    page, plan = Page(source), report.plan
    assert plan is not None and plan.spaces
    for row in report.layers:
        assert row.name in page.text and row.kind in page.text
    for where, operator, reason in report.barriers:
        assert where in page.text and operator in page.text and reason in page.text
    for number, space in enumerate(plan.spaces):
        (card,) = page.having("details", id=f"space-{number}")
        assert page.having("a", href=f"#space-{number}")  # the lane in the graph
        assert space.name in page.text
        for reader in space.readers:
            assert reader.layer in page.text
        for port in space.producers:
            assert port.layer in page.text
    for kind, count in report.reads.items():
        assert re.search(rf"\b{kind} .*? {count} ", page.text)
    for layer, side, channels, reason in report.kept:
        assert f"{layer} {channels} {side} channel" in page.text and reason in page.text
    assert "dense 12.5 100.0 % pruned 8.25 66.0 %" in page.text
    before, after = report.parameters
    assert page.having("b", title=f"{after:,}") and page.having("span", title=f"{before:,}")


def test_a_barrier_names_the_source_line() -> None:
    page = Page(render_page(barred()))
    assert "aten.cumsum" in page.text
    assert re.search(r"test_report\.py:\d+: return self\.d\(torch\.cumsum", page.text)


def test_the_page_needs_nothing_else(report: Report) -> None:
    source = render_page(report)
    page = Page(source)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", source)
    assert not page.having("script") and len(page.having("style")) == 1
    links = [found.get(name, "") for _, found in page.tags for name in ("src", "href", "xlink:href")]
    assert all(link.startswith(("#", "data:,")) for link in links if link)
    anchors = {found["id"] for _, found in page.tags if "id" in found}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors
    assert page.having("html", lang="en") and page.having("meta", name="viewport")
    assert all("aria-label" in found or "aria-hidden" in found for found in page.having("svg"))


def test_names_from_the_model_are_escaped() -> None:
    report = barred()
    rows = tuple(replace(row, name=HOSTILE, kind=HOSTILE, read=HOSTILE) for row in report.layers)
    plan = report.plan
    assert plan is not None
    spaces = tuple(
        replace(
            space,
            name=HOSTILE,
            producers=tuple(replace(p, layer=HOSTILE) for p in space.producers),
            readers=tuple(replace(r, layer=HOSTILE) for r in space.readers),
        )
        for space in plan.spaces
    )
    bad = replace(
        report,
        layers=rows,
        barriers=((HOSTILE, HOSTILE, HOSTILE),),
        kept=((HOSTILE, "input", 3, HOSTILE),),
        notes=(HOSTILE,),
        removed=(HOSTILE,),
        reads={HOSTILE: 3},
        plan=replace(plan, spaces=spaces),
    )
    page = Page(render_page(bad, {HOSTILE: 1.0}))
    assert not page.having("script") and not page.having("img") and len(page.having("style")) == 1
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    assert page.text.count(HOSTILE) > 10 and HOSTILE in attributes(page)


def test_text_is_shown_as_it_is() -> None:
    """Brackets and colons in names and source lines are no mark-up of the console's."""
    odd = "x[order] + y[/b] + z[a:x:b]"
    report = barred()
    rows = tuple(replace(row, name=odd) for row in report.layers)
    bad = replace(report, layers=rows, barriers=((odd, odd, odd),), kept=((odd, "input", 3, odd),), notes=(odd,))
    assert str(bad).count(odd) == len(rows) + 3 + 2 + 1


def test_pictures_show_the_weights_zeros() -> None:
    """Before and after, a row's stripes are the channels that the reader's weight uses."""
    model = zeroed()
    plan = upscale.export(model, (IMAGE,)).report.plan
    (a,) = (space for space in plan.spaces if space.name == "a")
    page = Page(render_page(upscale.export(model, (IMAGE,)).report))
    first, second = (n for n, (tag, found) in enumerate(page.tags) if "a: channels" in found.get("aria-label", ""))
    used = {"b": columns(model.b), "d": columns(model.d), "c": columns(model.c, 0, 12)}
    live = {c for wanted in used.values() for c in wanted}
    assert set(a.order) == live < set(range(12))
    for number, order in ((first, range(12)), (second, a.order)):
        assert page.tags[number][1]["viewbox"] == f"0 0 {len(order)} {len(a.readers)}"
        (held, wanted) = (page.tags[number + i][1]["d"] for i in (1, 2))
        rows = painted(wanted, len(a.readers), len(order))
        assert rows == [[c in used[r.layer] for c in order] for r in a.readers]
        assert painted(held, len(a.readers), len(order)) == [[c in live for c in order]] * len(a.readers)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        residual().to_html(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_page_without_plan_verification_or_layers() -> None:
    bare = Report((10, 5), (0, 0), (), {}, (), (), (), (), {})
    page = Page(render_page(bare))
    assert "was not compared" in page.text and "Shared tensors" not in page.text
    row = LayerRow("x", "linear", (0, 0), (0, 0), (0, 0), (0, 0), "-")
    Page(render_page(replace(bare, layers=(row,), plan=Plan("auto"))))


# -- size -------------------------------------------------------------------------------------------------------------


def test_a_large_network_makes_a_small_page() -> None:
    model = build("resnet50").float().eval()
    upscale.MaskingManager(model, example_inputs=torch.rand(1, 3, 64, 64)).importance().mask(0.25)
    report = upscale.export(model, (torch.rand(1, 3, 64, 64),), verify=False).report
    source = render_page(report)
    assert len(source.encode()) < 3_000_000 and len(Page(source).having("details", class_="space")) > 30


def test_wide_spaces_are_sampled_and_many_are_folded() -> None:
    generator = torch.Generator().manual_seed(0)
    spaces = []
    for number in range(45):
        order = torch.randperm(2048, generator=generator).tolist()
        readers = tuple(
            SpaceReader(f"r{i}", f"reader.{number}.{i}", 100 * number + i + 1, "t", ("r", "t"), _part(2048, generator))
            for i in range(12)
        )
        port = Port("p", f"writer.{number}", 100 * number)
        spaces.append(Space(f"space.{number}", 2048, tuple(order), (port,), readers))
    report = Report((2, 1), (2, 1), (), {}, (), (), (), (), {}, plan=Plan("auto", spaces=tuple(spaces)))
    source = render_page(report)
    page = Page(source)
    assert len(source.encode()) < 4_000_000
    assert sum("open" in card for card in page.having("details", class_="space")) == 40
    step = int(re.findall(r"one of every (\d+) channels", page.text)[0])
    assert step >= 4 and page.having("svg", viewbox=f"0 0 {-(-2048 // step)} 12")


def _part(channels: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.nonzero(torch.rand(channels, generator=generator) < 0.7).flatten().tolist())


def test_numbers_are_short() -> None:
    assert [short(v) for v in (0, 7, 999, 9_408, 11_689_512, 999_600_000)] == "0,7,999,9.41 k,11.7 M,1.00 G".split(",")
    assert (microseconds(21063.4), microseconds(0)) == ("21.1 µs", "0")
    assert (change((64, 48)), change({"before": 1000, "after": 1000})) == ("64 → 48", "1,000")


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latency", [{"x": 0.0}, {"x": float("nan")}, {"x": "fast"}, {3: 1.0}, {"x": True}])
def test_latencies_are_positive_milliseconds(latency: Any, report: Report, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"latency\[.*positive numbers of milliseconds"):
        report.to_html(tmp_path / "r.html", latency)
    assert list(tmp_path.iterdir()) == []


def test_paths_that_cannot_be_written(report: Report, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folder .*missing does not exist; make it first"):
        report.to_html(tmp_path / "missing" / "r.html")
    assert not (tmp_path / "missing").exists()
    with pytest.raises(InputError, match="is a folder: give the name of a file"):
        report.to_html(tmp_path)
    report.to_html(str(tmp_path / "r.html"))  # a string will do, and an existing file is replaced
    (tmp_path / "r.html").write_text("old")
    report.to_html(tmp_path / "r.html")
    assert "Pruning report" in (tmp_path / "r.html").read_text() and len(list(tmp_path.iterdir())) == 1


def test_a_pickled_report_is_text_and_says_so(report: Report, tmp_path: Path) -> None:
    text = pickle.loads(pickle.dumps(report))
    with pytest.raises(InputError, match="this report is its text only.*export it again"):
        write_page(text, tmp_path / "r.html")
    with pytest.raises(InputError, match="not of a int"):
        write_page(3, tmp_path / "r.html")  # type: ignore[arg-type]


def test_without_jinja2_the_page_says_what_to_install(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name.partition(".")[0] in ("jinja2", "markupsafe"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'upscale-pruning\[report\]'"):
        report.to_html(tmp_path / "r.html")
    assert report._repr_html_() and report.to_json()
    assert list(tmp_path.iterdir()) == []


# -- the guide --------------------------------------------------------------------------------------------------------


def test_the_documented_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = Path(__file__).parent.parent / "docs"
    (code,) = re.findall(r"```python\n(.*?)```", (docs / "report.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/report.md", "exec"), {"__name__": "example"})
    assert Page((tmp_path / "report.html").read_text()).having("section", id="latency")
    assert (docs / "report.png").stat().st_size < 200_000
