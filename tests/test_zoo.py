"""``upscale zoo``: every way in which a model can fail is a row, and the table is always whole."""

from __future__ import annotations

import csv
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("psutil")

import upscale
from support.command import command, environment, in_process, interrupted
from upscale.cli.zoo import HELP
from upscale.zoo.compare import DifferentError, relative_error, removed_share
from upscale.zoo.inputs import InputsError, parse_inputs
from upscale.zoo.markdown import document
from upscale.zoo.process import Limits, run_job, worker_limit
from upscale.zoo.randomise import randomise
from upscale.zoo.rows import BadTableError, Row, Settings, merged, read_rows, write_rows
from upscale.zoo.run import choose, left
from upscale.zoo.subject import Subject
from upscale.zoo.suite_file import FileSuite
from upscale.zoo.suites import SuiteError
from upscale.zoo.worker import Job, examine

TESTS = Path(__file__).resolve().parent
IMAGE = "2x3x12x12"
MODELS = {
    "good": IMAGE,
    "Tagger": "tokens=int50:2x7 mask=ones:2x7",
    "Branching": IMAGE,
    "silent": IMAGE,
    "deaf": IMAGE,
    "unmasked": IMAGE,
    "broken": IMAGE,
    "no_module": IMAGE,
    "sleeping": IMAGE,
    "hungry": IMAGE,
    "crashing": IMAGE,
}


def suite(folder: Path, *names: str) -> Path:
    path = folder / "mine.csv"
    lines = [f"{name},support.zoo_models:{name},{MODELS[name]}" for name in names or MODELS]
    path.write_text("name,builder,inputs\n" + "\n".join(lines) + "\n")
    return path


def upscale_command(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), cwd=folder, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )


# -- one model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["good", "Tagger"])
def test_a_model_that_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    stages: list[str] = []
    row = examine(Job(str(suite(tmp_path, name)), name, Settings(), 100), lambda row: stages.append(row.stage))
    assert row.good and row.reason == "" and row.stage == "", row
    assert stages == ["build", "mask", "export", "measure", "compare"]
    assert row.error is not None and row.error <= 1e-10 and row.dtype == "float64"
    assert row.batches == "2 3"
    assert row.parameters_before and row.parameters_after and row.parameters_after < row.parameters_before
    assert row.flops_removed and 0 < row.flops_removed < 1
    assert row.masked_channels and row.channels_removed == 1.0
    assert row.version == upscale.__version__ and row.peak_mb and row.reads


ERRORS = [
    ("broken", "build", "RuntimeError: this model cannot be built ("),
    ("no_module", "build", "TypeError: support.zoo_models:no_module returned int"),
    ("silent", "build", "UntestableError: no output"),
    ("deaf", "build", "UntestableError: the output hardly depends on the input"),
    ("unmasked", "mask", "NothingToPruneError: "),
    ("Branching", "export", "CaptureError: "),
]


@pytest.mark.parametrize(("name", "stage", "reason"), ERRORS, ids=[name for name, *_ in ERRORS])
def test_a_model_that_raises_is_a_row(
    name: str, stage: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    row = examine(Job(str(suite(tmp_path, name)), name, Settings(), 100))
    assert row.exported == "no" and row.equal == "" and row.stage == stage, row
    assert row.reason.startswith(reason) and "\n" not in row.reason, row.reason


ENDS = [
    ("sleeping", Limits(7, 4), "Timeout: more than 7 s"),
    ("hungry", Limits(100, 1), "OutOfMemory: more than 1 GB resident"),
    ("crashing", Limits(100, 4), "Crash: SIGSEGV"),
]


@pytest.mark.parametrize(("name", "limits", "reason"), ENDS, ids=[name for name, *_ in ENDS])
def test_a_process_that_is_ended_is_a_row(
    name: str, limits: Limits, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    (trial,) = choose([str(suite(tmp_path, name))], [], Settings(), limits)
    started = time.monotonic()
    row = run_job(trial.job, trial.blank, limits)
    assert row.exported == "no" and row.stage == "build" and row.reason.startswith(reason), row
    assert row.peak_mb and time.monotonic() - started < 60


def test_a_worker_without_a_parent_ends_itself(tmp_path: Path) -> None:
    job = Job(str(suite(tmp_path, "sleeping")), "sleeping", Settings(), timeout=5)
    (tmp_path / "job.json").write_text(job.to_json())
    started = time.monotonic()
    arguments = [sys.executable, "-m", "upscale.zoo.worker", str(tmp_path / "job.json"), str(tmp_path / "row.json")]
    ended = subprocess.run(arguments, env=environment(), capture_output=True, timeout=60, check=False)
    assert ended.returncode != 0 and time.monotonic() - started < 50
    assert worker_limit(Limits(timeout=5)) > 8  # the parent comes first


# -- the command ------------------------------------------------------------------------------------------------------


def test_run_resume_and_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    file, out, page = suite(tmp_path, "good", "broken"), tmp_path / "table.csv", tmp_path / "doc" / "coverage.md"
    assert in_process("zoo", "--suite", file, "--out", out, "--markdown", page) == 1  # one of them is not equal
    assert "2 models: 1 exported, 1 equal" in capsys.readouterr().out
    rows = {row.model: row for row in read_rows(out)}
    assert rows["good"].good and rows["broken"].reason.startswith("RuntimeError")
    assert "| mine.csv | broken | no | build | RuntimeError: this model cannot be built" in page.read_text()

    before = out.read_bytes()
    assert in_process("zoo", "--suite", file, "--out", out) == 1
    assert "2 of 2 models are in" in capsys.readouterr().err
    assert out.read_bytes() == before

    assert in_process("zoo", "good", "--suite", file, "--side", "both", "--out", out) == 0
    assert [(row.model, row.side) for row in read_rows(out)] == [
        ("good", "input"),
        ("broken", "input"),
        ("good", "both"),
    ]
    assert in_process("coverage", out, "--markdown", page) == 0
    assert page.read_text().count("\n## ") == 2


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_a_whole_table(tmp_path: Path) -> None:
    file, out = suite(tmp_path, "broken", "sleeping"), tmp_path / "table.csv"
    _, status, output = interrupted(["zoo", "--suite", file, "--out", out], tmp_path, out.exists)
    assert status == 130 and "interrupted" in output, output
    assert [row.model for row in read_rows(out)] == ["broken"]
    assert not list(tmp_path.glob(".*.tmp"))


MISTAKES = [
    (("zoo", "godo", "--suite", "mine.csv"), "no model 'godo' in mine.csv: did you mean good?"),
    (("zoo", "--suite", "nowhere.csv"), "no suite 'nowhere.csv'"),
    (("zoo", "--suite", "mine.csv", "--amount", "1"), "--amount must be more than 0 and less than 1"),
    (("zoo", "--suite", "mine.csv", "--side", "left"), "left"),
    (("zoo", "--suite", "mine.csv", "--out", "mine.csv"), "mine.csv is not a coverage table"),
    (("coverage", "nothing.csv"), "there is no table nothing.csv"),
    (("zooo",), "No such command"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message[:20] for _, message in MISTAKES])
def test_a_mistake_is_one_message_and_status_2(
    arguments: Sequence[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(suite(tmp_path).parent)
    assert in_process(*arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_help_has_an_example_that_is_right(tmp_path: Path) -> None:
    shown = upscale_command(tmp_path, "zoo", "--help")
    assert shown.returncode == 0
    examples = [line.strip() for line in HELP.splitlines() if line.startswith("  upscale ")]
    assert examples
    for example in examples:
        assert example in shown.stdout
    for option in ("--suite", "--amount", "--side", "--reads", "--timeout", "--memory", "--resume", "--markdown"):
        assert option in shown.stdout
    # the suite file that the help shows is one
    lines = [line.strip() for line in HELP.splitlines()]
    start = lines.index("name,builder,inputs")
    (tmp_path / "shown.csv").write_text("\n".join(lines[start : start + 3]) + "\n")
    assert FileSuite(tmp_path / "shown.csv").names() == ["small", "tagger"]


def test_without_typer_one_line_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ImportError('not here')")
    path = os.pathsep.join([str(tmp_path), str(TESTS.parent / "src")])
    ended = subprocess.run(
        command("zoo"), env={**environment(), "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr.strip() == "upscale needs typer: pip install 'upscale-pruning[cli]'"


# -- the parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no models"),
        ("name,builder\na,b:c", "inputs is missing"),
        ("name,builder,inputs\na,b,2x3", "package.module:function"),
        ("name,builder,inputs\na,b:c,two", "cannot read the input 'two'"),
        ("name,builder,inputs\na,b:c,x=2x3 2x3", "either all inputs have a name or none has"),
        ("name,builder,inputs\na,b:c,2x3\na,b:c,2x3", "has a more than once"),
    ],
)
def test_a_suite_file_that_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(SuiteError, match=message):
        FileSuite(path)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="TOML is read from Python 3.11 on")
def test_a_suite_in_toml(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[[model]]\nname = "good"\nbuilder = "support.zoo_models:good"\ninputs = "2x3x12x12"\n')
    subject = FileSuite(path).build("good", seed=0)
    assert isinstance(subject.model, nn.Sequential) and subject.args[0].shape == (2, 3, 12, 12)


def test_inputs() -> None:
    image, tokens = parse_inputs("2x3x8x8 int7:2x5")
    assert image.shape == (2, 3, 8, 8) and image.dtype == torch.float32
    assert tokens.dtype == torch.int64 and 0 <= int(tokens.min()) and int(tokens.max()) < 7
    named = parse_inputs("ids=int:2x5 mask=ones:2x5 which=bool:2")
    assert isinstance(named, dict) and list(named) == ["ids", "mask", "which"]
    assert bool(named["mask"].all()) and named["which"].dtype == torch.bool
    for wrong in ("", "2x", "int:", "x=", "bool3:2", "complex:2"):
        with pytest.raises(InputsError):
            parse_inputs(wrong)


def test_the_table_on_disk(tmp_path: Path) -> None:
    path, settings = tmp_path / "folder" / "table.csv", Settings(amount=0.1)
    assert read_rows(path) == []
    one = Row.blank("mine", "a, b", settings, "1")
    one.error, one.reason, one.parameters_before = 2.5e-16, 'a "quoted"\treason', 12
    two = Row.blank("mine", "c", settings, "1")
    write_rows(path, [one, two])
    assert read_rows(path) == [one, two]
    new = Row.blank("mine", "a, b", settings, "1")
    assert merged([one, two], new) == [new, two]
    newer = Row.blank("mine", "a, b", settings, "2")
    assert merged([one, two], newer) == [one, two, newer]
    trials = choose([str(suite(tmp_path, "good"))], [], Settings(), Limits())
    write_rows(path, [trials[0].blank])
    assert left(trials, path, resume=True) == [] and left(trials, path, resume=False) == trials
    path.write_text("x,y\n1,2\n")
    with pytest.raises(BadTableError, match="columns differ"):
        read_rows(path)


def test_markdown_of_failures_and_of_nothing() -> None:
    row = Row.blank("mine", "a|b", Settings(), "1")
    row.reason = "ValueError: <odd> | text"
    text = document([row])
    assert r"a\|b" in text and r"&lt;odd> \| text" in text
    assert document([]).startswith("# ")


def test_share_of_masked_channels_removed() -> None:
    before = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Conv2d(8, 8, 3, groups=2), "c": nn.Linear(8, 4)})
    after = nn.ModuleDict({"a": nn.Linear(2, 8), "b": nn.Conv2d(6, 6, 3, groups=2)})
    four = torch.arange(4)
    assert removed_share(before, after, {"input": {"a": four}}) == 1.0  # six are gone, four were masked
    assert removed_share(before, after, {"input": {"b": four}}) == 0.5
    assert removed_share(before, after, {"input": {"c": four}, "output": {"a": four}}) == 0.5
    assert removed_share(before, after, {"input": {}}) is None


def test_relative_error_of_nested_results() -> None:
    a = {"x": torch.tensor([1.0, -2.0]), "y": (torch.arange(3), None)}
    assert relative_error(a, {"x": torch.tensor([1.0, -1.0]), "y": (torch.arange(3), None)}) == 0.5
    for wrong in (
        {"x": torch.zeros(3), "y": a["y"]},
        {"x": torch.tensor([1.0, float("nan")]), "y": a["y"]},
        {"x": a["x"], "y": (torch.zeros(3, dtype=torch.int64), None)},
        {"x": a["x"]},
    ):
        with pytest.raises(DifferentError):
            relative_error(a, wrong)


def test_randomised_models_have_no_regular_parameters() -> None:
    def made() -> Subject:
        torch.manual_seed(0)
        weak = nn.Conv2d(3, 4, 3)
        nn.init.normal_(weak.weight, std=1e-4)
        model = nn.Sequential(weak, nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 2))
        subject = Subject(model.eval(), (torch.randn(2, 3, 4, 4),))
        randomise(subject)
        return subject

    subject = made()
    for name, tensor in subject.model.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.unique().numel() == tensor.numel(), name
    assert not any(module.training for module in subject.model.modules())
    assert subject.model[0].weight.std() > 0.1  # type: ignore[index]
    normed = subject.model[:2](*subject.args)  # type: ignore[index]
    assert 0.2 < normed.std() < 5  # the statistics are near those of the example
    assert torch.equal(subject.call(subject.model), made().call(made().model))


# -- the suites that are built in -------------------------------------------------------------------------------------


def test_built_in_suites_are_whole() -> None:
    for package in ("timm", "torchvision", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    from upscale.zoo.suite_timm import Suite as Timm
    from upscale.zoo.suite_torchvision import Suite as Torchvision
    from upscale.zoo.transformers_models import MODELS as TRANSFORMERS

    table = Timm()
    modules = {entry["module"] for entry in table._table.values()}
    timm = importlib.import_module("timm")  # only now: a suite makes torchvision importable
    if timm.__version__ == table.version:
        assert modules == set(timm.list_modules())
    assert {"resnet18", "raft_small", "r3d_18", "fcn_resnet50", "fcos_resnet50_fpn.backbone"} <= {
        *Torchvision().names()
    }
    assert len(TRANSFORMERS) >= 22
    subject = table.build("test_convnext", seed=0)
    assert subject.call(subject.model).shape[0] == 2


def test_columns_of_the_table_are_documented_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    write_rows(path, [])
    with path.open() as file:
        header = next(csv.reader(file))
    assert header[:6] == ["suite", "model", "exported", "equal", "error", "sensitivity"]


def test_without_a_library_it_is_said_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("upscale.cli.zoo.find_spec", lambda name: None)
    assert in_process("zoo", "resnet18") == 2
    assert "no suite is installed: pip install 'upscale-pruning[zoo]'" in capsys.readouterr().err
