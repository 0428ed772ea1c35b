"""Repair on the command line: ``upscale prune --repair`` and ``upscale reproduce --repair``."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("typer")
pytest.importorskip("psutil")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

import upscale
from support.classifiers import Residual, enter
from support.command import in_process
from upscale.reproduce.evaluation import batches_of
from upscale.reproduce.gains import curves, gains
from upscale.reproduce.images import View, load_dataset
from upscale.reproduce.rows import RIDGE, Combination, Row, Source, read_rows, write_rows
from upscale.reproduce.run import combinations, left, plan_jobs
from upscale.reproduce.show import gains_table, table
from upscale.reproduce.summary import document
from upscale.reproduce.worker import Job, Subject, evaluate
from upscale.zoo.table import BadTableError

NAME = "support.classifiers:residual"
VIEW = View((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 16)
Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """``upscale`` in a folder that has weights of a small network and images, of which 40 are for calibration."""
    enter(tmp_path, monkeypatch, 60)
    return in_process


PRUNE = ("prune", NAME, "--weights", "w.safetensors", "--inputs", "2x3x16x16", "--data", "d.npz", "--amount", 0.5)


def test_prune_repairs_on_images_that_are_held_out(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is what the library gives for the same images, and far closer to the original than without repair."""
    assert command(*PRUNE, "--calibration", 25, "--repair", "--out", "repaired.safetensors", "--json") == 0
    found = json.loads(capsys.readouterr().out)["repair"]
    assert command(*PRUNE, "--out", "plain.safetensors", "--json") == 0
    assert "repair" not in json.loads(capsys.readouterr().out)
    model = Residual().eval()
    model.load_state_dict(load_file("w.safetensors"))
    test, calibration = load_dataset(Path("d.npz"), "", VIEW).split(60, 25, seed=0)
    batches = batches_of(calibration)
    masked = upscale.mask(model, (torch.zeros(2, 3, 16, 16),), amount=0.5, calibration=batches)
    repaired = upscale.repair(masked, model, batches, progress=False)
    assert found["outputs"]["after"] == pytest.approx(repaired.repair_report.outputs[1], rel=1e-3)
    assert [row["name"] for row in found["layers"]] == ["stem", "inner", "last", "head"]
    x = test.batch(range(len(test)))
    with torch.no_grad():
        plain, mended = (upscale.load(f"{name}.safetensors", Residual()).eval()(x) for name in ("plain", "repaired"))
        torch.testing.assert_close(mended, repaired(x), rtol=1e-3, atol=1e-4)
        assert (mended - model(x)).square().sum() < 0.5 * (plain - model(x)).square().sum()


def test_prune_says_what_the_repair_did(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*PRUNE, "--calibration", 30, "--repair", "--eval") == 0
    shown = capsys.readouterr().out
    assert "repair      error of the outputs" in shown and "3 of 4 layers fitted" in shown and "top-1" in shown


def test_prune_fits_blocks(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    errors = []
    for more in ((), ("--blocks", 60)):
        assert command(*PRUNE, "--calibration", 30, "--repair", "--json", *more) == 0
        found = json.loads(capsys.readouterr().out)["repair"]
        errors.append(found["outputs"]["after"])
        assert bool(found["blocks"]) == bool(more)
    assert errors[1] < errors[0]


def test_too_few_images_are_told(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*PRUNE, "--calibration", 10, "--repair") == 0
    assert "upscale: 1 of 4 layers have fewer samples than unknowns, head" in capsys.readouterr().err
    assert command(*PRUNE, "--calibration", 10, "--repair", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*PRUNE[:6], "--amount", 0.5, "--repair"), "--repair needs images: say where with --data"),
        ((*PRUNE[:-2], "--masked", "--repair"), "--repair needs the weights before masking"),
        ((*PRUNE, "--blocks", 20), "--blocks 20 goes on from what --repair finds"),
    ],
)
def test_a_repair_that_cannot_be_is_refused(
    command: Command, arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    assert message in capsys.readouterr().err


# -- reproduce --------------------------------------------------------------------------------------------------------


def source(images: int = 20, calibration: int = 40) -> Source:
    return Source(NAME, "w.safetensors", "d.npz", images, calibration, 0, VIEW.mean, VIEW.std, VIEW.size)


def without_times(row: Row) -> list[object]:
    return [value for name, value in vars(row).items() if name not in ("latency_ms", "latency_left", "seconds")]


def test_a_repaired_row_is_what_the_library_gives_by_itself(command: Command) -> None:
    """Also between rows that are not repaired, which are as if there were none."""
    wanted = combinations(["l2"], ["input"], ["unconstrained"], [0.5], ["", RIDGE])
    plain, repaired = (evaluate(job) for job in plan_jobs([source()], wanted)[1:])
    assert (repaired.reason, repaired.repaired, repaired.calibration, plain.calibration) == ("", RIDGE, 40, None)
    again = [evaluate(Job(source(), how)) for how in reversed(wanted[1:])]
    assert [*map(without_times, again)] == [*map(without_times, (repaired, plain))]
    subject = Subject(source())
    masked = upscale.mask(subject.dense, (subject.example,), amount=0.5)
    mended = upscale.repair(masked, subject.dense, batches_of(subject.calibration), progress=False)
    with torch.no_grad():
        right = mended(subject.images.batch(range(20))).argmax(1) == subject.images.labels
    assert repaired.top1 == pytest.approx(100 * right.double().mean().item())
    assert repaired.parameters == plain.parameters


def test_without_images_to_repair_on_there_is_a_reason(command: Command) -> None:
    row = evaluate(Job(source(images=0), Combination("l2", amount=0.5, method="unconstrained", repaired=RIDGE)))
    assert "not evaluated on" in row.reason and row.top1 is None


def test_repair_and_images_are_part_of_the_key(command: Command) -> None:
    how = Combination("l2", "input", "unconstrained", 0.5, RIDGE)
    keys = {
        Job(source(calibration=n), h).blank().key for n in (20, 40) for h in (how, Combination(*vars(how).values()))
    }
    assert len(keys) == 2
    plain = Combination("l2", "input", "unconstrained", 0.5)
    keys = {Job(source(calibration=n), plain).blank().key for n in (20, 40)}
    assert len(keys) == 2  # where none are set aside already, others are evaluated on
    assert str(how) == "l2 input unconstrained + ridge 50 %"


def test_one_command_writes_both_and_an_older_table_goes_on(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ("reproduce", "--models", NAME, "--weights", "w.safetensors", "--data", "d.npz", "--size", 16)
    common += ("--images", 20, "--calibration", 40, "--importance", "l2", "--workers", 1, "--out", "out")
    assert command(*common, "--amounts", ".5", "--methods", "unconstrained,constrained") == 0
    file = Path("out/rows.csv")
    with file.open(newline="") as lines:
        older = [line[:-3] for line in csv.reader(lines)]  # from before there were repaired rows
    with file.open("w", newline="") as lines:
        csv.writer(lines).writerows(older)
    capsys.readouterr()
    assert command(*common, "--amounts", ".5", "--methods", "unconstrained,constrained", "--repair") == 0
    shown = capsys.readouterr()
    assert "3 of 5 combinations are in" in shown.err.replace("\n", " ")
    rows = read_rows(file)
    assert [row.repaired for row in rows] == ["", "", "", RIDGE, RIDGE]
    text = Path("out/summary.md").read_text()
    assert "What unconstrained masks gain, both with ridge (40 images)" in text
    assert "| unconstrained + ridge (40 images) |" in text and "| unconstrained |" in text
    assert len(list(Path("out").glob("*.png"))) == 1


def test_a_table_that_lacks_more_than_new_columns_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.csv", [])
    header = (tmp_path / "rows.csv").read_text().strip().split(",")
    for columns in (header[:5], [*header[:-2], "repairs"], [*header, "more"]):
        (tmp_path / "rows.csv").write_text(",".join(columns) + "\n")
        with pytest.raises(BadTableError, match="its columns differ"):
            left([], tmp_path / "rows.csv", resume=True)


def test_repaired_masks_are_compared_with_repaired_ones() -> None:
    rows = []
    for method, repaired, top1 in (
        ("dense", "", 80.0),
        ("unconstrained", "", 30.0),
        ("constrained", "", 20.0),
        ("unconstrained", RIDGE, 75.0),
        ("constrained", RIDGE, 70.0),
    ):
        keys = {"version": "1", "torch": "2", "machine": "m", "repaired": repaired}
        row = Row("net", "w", "d", 9, 0, "l2", "input", method, 0.5 if method != "dense" else 0.0, **keys)
        row.top1, row.flops_left, row.latency_left, row.evaluated = top1, 0.5, 0.5, 9
        row.calibration = 1024 if repaired else None
        rows.append(row)
    found = gains(curves(rows), "unconstrained")
    assert [(one.better.way, one.everywhere["amount"]) for one in found] == [
        ("unconstrained", 10.0),
        ("unconstrained + ridge (1,024 images)", 5.0),
    ]
    assert "| net | +5.0 |" in document(rows, [], "x") and "| net | +10.0 |" in document(rows, [], "x")
    assert len(table(rows).rows) == 4 and len(gains_table(rows).rows) == 2
