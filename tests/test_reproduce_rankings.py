"""``upscale reproduce --ranking``: all layers ranked together, beside the same share of each, never mixed with it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import upscale
from support.classifiers import enter
from support.command import in_process
from upscale.reproduce import plots
from upscale.reproduce.evaluation import FROM_IMAGES
from upscale.reproduce.gains import curves, gains
from upscale.reproduce.plots import write_plots
from upscale.reproduce.rows import EVEN, GLOBAL, METHODS, RANKINGS, RIDGE, Combination, Row, Source, blank, read_rows
from upscale.reproduce.run import combinations
from upscale.reproduce.show import gains_table, table
from upscale.reproduce.summary import document
from upscale.reproduce.worker import Job, Subject, evaluate

NAME = "support.classifiers:residual"
SOURCE = Source(NAME, "w.safetensors", "d.npz", 20, 40, 0, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 16)
Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``upscale`` in a folder that has weights of a small network and images, of which 40 are for calibration."""
    enter(tmp_path, monkeypatch, 60)
    return in_process


def by_ranking(how: Combination) -> list[Combination]:
    return [replace(how, ranking=ranking) for ranking in RANKINGS]


def without_times(row: Row) -> list[object]:
    return [value for name, value in vars(row).items() if name not in ("latency_ms", "latency_left", "seconds")]


# -- masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("importance", ["l2", "lamp", "obs"])
def test_as_many_channels_go_but_others(command: Command, importance: str) -> None:
    """Of 16, 16 and 24 channels a quarter is whole; what is global is what the library gives by itself."""
    subject = Subject(SOURCE)
    counts, masks = [], []
    for how in by_ranking(Combination(importance, "input", "unconstrained", 0.25)):
        counts.append(subject.mask(how))
        masks.append(weights_of(subject.model))
    assert counts == [14, 14] and masks[0] != masks[1]
    heuristic = FROM_IMAGES[importance](subject.calibration) if importance in FROM_IMAGES else importance
    model = upscale.mask(subject.dense, subject.example, amount=0.25, importance=heuristic, is_global=True)
    assert weights_of(model) == masks[1] != weights_of(subject.dense)


def weights_of(model: nn.Module) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in model.state_dict().items()}


def test_all_methods_and_sides_have_global_masks_and_no_row_depends_on_another(command: Command) -> None:
    """Managers and scores are kept between combinations, for each ranking its own."""
    wanted = combinations(["l2", "random"], ["input", "output"], METHODS, [0.25], ["", RIDGE], RANKINGS)[1:]
    assert {(how.method, how.side) for how in wanted if how.ranking == GLOBAL} == {
        (method, side) for method in METHODS for side in ("input", "output") if (method, side) != (METHODS[2], "output")
    }
    jobs = [Job(SOURCE, how) for how in wanted]
    forth = [evaluate(job) for job in jobs]
    back = [evaluate(job) for job in reversed(jobs)]
    assert [*map(without_times, forth)] == [*map(without_times, back[::-1])]
    assert not any(row.reason for row in forth) and [row.combination for row in forth] == wanted
    assert all(row.channels for row in forth)
    kept = {replace(how, ranking=""): set() for how in wanted}
    for row in forth:
        kept[replace(row.combination, ranking="")].add(row.flops)
    assert any(len(flops) == 2 for flops in kept.values())


# -- rows and their table ---------------------------------------------------------------------------------------------


def test_the_ranking_is_part_of_the_key_and_of_titles() -> None:
    even, everywhere = by_ranking(Combination("obs", "input", "unconstrained", 0.5, RIDGE))
    assert Job(SOURCE, even).blank().key != Job(SOURCE, everywhere).blank().key
    assert Job(SOURCE, everywhere).blank().combination == everywhere
    assert str(even) == "obs input unconstrained + ridge 50 %"
    assert str(everywhere) == "obs input unconstrained, global + ridge 50 %"


def test_each_combination_comes_in_each_ranking() -> None:
    found = combinations(["l1"], ["input"], ["constrained"], [0.5], rankings=RANKINGS)
    assert [str(how) for how in found] == ["dense", "l1 input constrained 50 %", "l1 input constrained, global 50 %"]
    assert {how.ranking for how in combinations(["l1"], ["input"], METHODS, [0.5])} == {EVEN}


def test_an_older_table_goes_on_with_rows_of_another_ranking(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("reproduce", "--models", NAME, "--weights", "w.safetensors", "--data", "d.npz", "--size", 16)
    common += ("--images", 20, "--calibration", 40, "--importance", "l2", "--amounts", ".5", "--workers", 1)
    assert command(*common, "--out", "out") == 0
    file = Path("out/rows.csv")
    with file.open(newline="") as lines:
        older = [line[:-1] for line in csv.reader(lines)]  # from before there were rankings
    assert older[0][-1] == "calibration"
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows(older)
    assert {row.ranking for row in read_rows(file)} == {EVEN}
    capsys.readouterr()
    assert command(*common, "--ranking", "even,global", "--out", "out") == 0
    shown = capsys.readouterr()
    assert "3 of 5 combinations are in" in shown.err.replace("\n", " ")
    assert "unconstrained, global" in shown.out
    assert [row.ranking for row in read_rows(file)] == [EVEN, EVEN, EVEN, GLOBAL, GLOBAL]
    text = Path("out/summary.md").read_text()
    assert "### What unconstrained masks gain\n" in text
    assert "### What unconstrained masks gain, both global\n" in text
    assert "| l2 | unconstrained, global |" in text and "| l2 | unconstrained |" in text
    assert command(*common, "--ranking", "global", "--out", "out") == 0
    assert "3 of 3 combinations are in" in capsys.readouterr().err.replace("\n", " ")


# -- comparisons ------------------------------------------------------------------------------------------------------


def drawn(method: str, ranking: str, top1: float, model: str = "net") -> Row:
    how = Combination("l2", "input", method, 0.5, ranking=ranking) if method != "dense" else Combination()
    made = blank(replace(SOURCE, model=model), how, "1", "2", "machine")
    made.top1, made.flops_left, made.latency_left, made.evaluated = top1, 0.5, 0.5, 20
    return made


def four(model: str = "net") -> list[Row]:
    return [
        drawn("dense", EVEN, 80, model),
        drawn("unconstrained", EVEN, 30, model),
        drawn("constrained", EVEN, 20, model),
        drawn("unconstrained", GLOBAL, 75, model),
        drawn("constrained", GLOBAL, 70, model),
    ]


def test_masks_are_compared_with_masks_of_their_ranking() -> None:
    rows = four()
    found = gains(curves(rows), "unconstrained")
    assert [(one.better.way, one.everywhere["amount"]) for one in found] == [
        ("unconstrained", 10.0),
        ("unconstrained, global", 5.0),
    ]
    assert [one.better.ranking for one in found] == [one.other.ranking for one in found]
    text = document(rows, [], "x")
    assert "| net | +10.0 |" in text and "| net | +5.0 |" in text
    assert len(table(rows).rows) == 4 and len(gains_table(rows).rows) == 2
    assert gains(curves([rows[0], rows[1], rows[4]]), "unconstrained") == []


def test_pictures_have_panels_for_each_ranking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of networks too: never over curves of different ranking."""
    seen: dict[str, dict[str, list[float]]] = {}

    def kept(path: Path, title: str, lines: dict[tuple[str, str, str], dict[str, tuple]], dense: float) -> None:
        seen[path.name] = {f"{panel[0]}: {panel[1]}": list(of["amount"][1]) for panel, of in lines.items()}
        draw(path, title, lines, dense)

    draw = plots._draw
    monkeypatch.setattr(plots, "_draw", kept)
    written = write_plots(tmp_path, four() + four("other"))
    assert [path.name for path in written] == list(seen) and all(path.is_file() for path in written)
    names = ["l2: unconstrained", "l2: constrained", "l2, global: unconstrained", "l2, global: constrained"]
    assert [list(lines) for lines in seen.values()] == [names] * 3
    net, _, mean = seen.values()
    assert [line[-1] for line in net.values()] == [30, 20, 75, 70]
    assert [line[-1] for line in mean.values()] == pytest.approx([30 / 80, 20 / 80, 75 / 80, 70 / 80])
