"""``upscale bench``: a table that is always whole, numbers that mean something, and doubts that are told."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("psutil")

from support.command import in_process, interrupted
from upscale.bench import checks, worker
from upscale.bench.backends import inductor, onnxruntime
from upscale.bench.markdown import document
from upscale.bench.models import Source, build, find_models
from upscale.bench.rows import COLUMNS, VARIANTS, Place, Row, Setting, grouped, merged, read_rows, write_rows
from upscale.bench.run import left, plan_jobs, run_one
from upscale.bench.show import failed, line, quotient, remarks
from upscale.bench.variants import UnavailableError, Workbench
from upscale.bench.worker import Budget, Job, examine
from upscale.cli.bench import HELP
from upscale.zoo.process import Limits
from upscale.zoo.table import BadTableError

TESTS = Path(__file__).resolve().parent
SMALL = "support.bench_models:small"
SETTING = Setting(amount=0.25, batch=2, size=8)
QUICK = Budget(rounds=3, warmup=1, seconds=60)
HERE = Place("1", "2", "a machine")


def examined(
    model: str = SMALL, suite: str = "", setting: Setting = SETTING, variants: Sequence[str] = VARIANTS
) -> Any:
    rows = examine(Job(Source(suite, model), setting, tuple(variants), QUICK, 100))
    return {row.variant: row for row in rows}


# -- one model --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", ["contiguous", "channels_last"])
def test_every_variant_is_timed_and_counted(memory_format: str) -> None:
    stages: list[tuple[str, ...]] = []
    setting = replace(SETTING, memory_format=memory_format)
    job = Job(Source("", SMALL), setting, VARIANTS, QUICK, 100)
    rows = {row.variant: row for row in examine(job, lambda rows: stages.append(tuple(row.stage for row in rows)))}
    timed = [name for name in VARIANTS if name != "contiguous" or rows[name].median_ms is not None]
    for name in timed:
        row = rows[name]
        assert row.reason == "" and row.stage == "" and row.runs == 3, row
        assert row.median_ms and row.best_ms and row.best_ms <= row.median_ms and row.iqr_ms is not None
        assert row.ratio and row.control and row.input == "2x3x8x8" and row.peak_mb
        assert row.denormal_weights == 0 and row.denormal_activations == 0
    assert rows["unpruned"].ratio == 1 and stages[0] == ("build",) * len(VARIANTS)
    for name in ("constrained", "baseline", "gather", "auto"):
        assert rows[name].error is not None and rows[name].error < 1e-4, name
    assert rows["ideal"].error is None  # its values are wrong, and nobody says otherwise
    assert rows["ideal"].flops == rows["auto"].flops < rows["unpruned"].flops
    assert rows["ideal"].copied_bytes < rows["auto"].copied_bytes <= rows["gather"].copied_bytes
    assert rows["ideal"].kernels <= rows["auto"].kernels <= rows["gather"].kernels


def test_a_method_that_is_not_there_is_an_empty_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    from upscale import InputError
    from upscale.bench import variants

    class Old(variants.MaskingManager):
        def __init__(self, model: nn.Module, side: Any, method: Any, **options: Any) -> None:
            if method == "contiguous":
                raise InputError("method must be one of 'unconstrained', 'constrained', not 'contiguous'")
            super().__init__(model, side, method, **options)

    monkeypatch.setattr(variants, "MaskingManager", Old)
    rows = examined(variants=("unpruned", "contiguous"))
    assert rows["contiguous"].median_ms is None and rows["contiguous"].ratio is None
    assert rows["contiguous"].reason == "this version has no masks of method 'contiguous'"
    assert rows["unpruned"].median_ms and not failed(list(rows.values()))


def test_wrong_values_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    from upscale.bench import variants

    monkeypatch.setattr(
        variants, "exported", lambda subject, reads, setting: nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    )
    rows = examined(variants=("unpruned", "auto"))
    assert rows["auto"].median_ms is None and rows["auto"].reason.startswith("its output differs")
    assert rows["auto"].stage == "make" and failed(list(rows.values()))


def test_named_inputs_and_a_suite_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TESTS))
    suite = tmp_path / "mine.csv"
    suite.write_text("name,builder,inputs\nnamed,support.bench_models:Named,image=2x3x8x8 scale=1x1\n")
    row = examined("named", str(suite), replace(SETTING, size=0, batch=1), ("unpruned", "auto", "ideal"))["ideal"]
    assert row.reason == "" and row.median_ms and row.input == "1x3x8x8 1x1" and row.suite == "mine.csv"


def test_making_a_variant_leaves_the_unpruned_weights() -> None:
    subject, fits = build(Source("", SMALL), SETTING)
    assert fits
    before = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    bench = Workbench(subject, SETTING)
    for name in ("constrained", "gather", "ideal"):
        bench.make(name)
        assert all(torch.equal(before[key], tensor) for key, tensor in subject.model.state_dict().items()), name


def test_the_call_is_in_the_memory_format_of_the_setting() -> None:
    subject, _ = build(Source("", SMALL), replace(SETTING, memory_format="channels_last"))
    assert subject.args[0].is_contiguous(memory_format=torch.channels_last) and subject.args[0].shape == (2, 3, 8, 8)
    auto = Workbench(subject, replace(SETTING, memory_format="channels_last")).make("auto").model
    stem = auto.get_submodule("stem.0").weight
    assert isinstance(stem, torch.Tensor) and stem.is_contiguous(memory_format=torch.channels_last)


# -- processes and the table ------------------------------------------------------------------------------------------


def test_a_model_that_fails_or_hangs_is_rows_with_the_reason() -> None:
    setting = replace(SETTING, batch=1)
    for name, limits, reason in (
        ("broken", Limits(60, 4), "RuntimeError: this"),
        ("sleeping", Limits(6, 4), "Timeout"),
    ):
        source = Source("", f"support.bench_models:{name}")
        (job,) = plan_jobs([source], [setting], 8, ("unpruned", "auto"), QUICK, limits)
        rows = run_one(job, limits)
        assert [row.variant for row in rows] == ["unpruned", "auto"]
        assert all(row.reason.startswith(reason) and row.stage == "build" for row in rows), rows
        assert failed(rows) and reason in line(rows)


def test_run_resume_plot_and_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(TESTS))
    monkeypatch.setenv("COLUMNS", "120")
    out, picture, page = tmp_path / "b.csv", tmp_path / "b.png", tmp_path / "doc" / "speed.md"
    common = ("bench", SMALL, "--size", 8, "--rounds", 2, "--variants", "auto,ideal", "--out", out)
    assert in_process(*common, "--batch", "1,2", "--plot", picture, "--markdown", page) == 0
    shown = capsys.readouterr()
    assert "auto" in shown.out and str(page) in shown.out.replace("\n", "")
    with out.open() as file:
        assert tuple(next(csv.reader(file))) == COLUMNS
    rows = read_rows(out)
    assert [(row.batch, row.variant) for row in rows] == [
        (batch, name) for batch in (1, 2) for name in ("unpruned", "auto", "ideal")
    ]
    assert picture.read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob(".*"))
    text = page.read_text()
    assert f"upscale bench {SMALL} --size 8" in text and text.count("### ") == 2

    before = out.read_bytes()
    assert in_process(*common, "--batch", "1,2") == 0
    assert out.read_bytes() == before and "2 of 2 measurements are in" in capsys.readouterr().err
    assert in_process(*common, "--batch", 1, "--no-resume") == 0
    again = read_rows(out)
    assert [row.key for row in again] == [row.key for row in rows]
    assert [row.median_ms for row in again[:3]] != [row.median_ms for row in rows[:3]] and again[3:] == rows[3:]


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_leaves_a_whole_table(tmp_path: Path) -> None:
    out = tmp_path / "b.csv"
    models = ["support.bench_models:broken", "support.bench_models:sleeping"]
    _, status, output = interrupted(["bench", *models, "--size", "8", "--out", out], tmp_path, out.exists)
    assert status == 130 and "interrupted" in output, output
    assert {row.model for row in read_rows(out)} == {"support.bench_models:broken"}
    assert not list(tmp_path.glob(".*.tmp"))


MISTAKES = [
    (("rezznet18",), "no model 'rezznet18' in torchvision, timm: did you mean resnet18"),
    (("--amount", "0.2,2"), "--amount: 2 must be more than 0 and less than 1"),
    (("--batch", "1,x"), "--batch: 'x' is no number"),
    (("--batch", "0"), "--batch: 0 must be at least 1"),
    (("--memory-format", "nhwc"), "--memory-format: 'nhwc' is none of contiguous, channels_last"),
    (("--backend", "tensorrt"), "--backend: 'tensorrt' is none of eager, compile, cudagraphs, onnxruntime"),
    (("--variants", "best"), "--variants: 'best' is none of unpruned"),
    (("--device", "gpu"), "--device: 'gpu' is no device"),
    (("--plot", "plot.txt"), "must end in .png, .pdf or .svg"),
    ((SMALL, "--out", "other.csv"), "other.csv is not a speed table"),
    (("--suite", "nowhere.csv", "x"), "no suite 'nowhere.csv'"),
]


def need(package: str) -> None:
    """Skip where a package is not installed. It is not imported here: timm wants torchvision's operators first."""
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message[:24] for _, message in MISTAKES])
def test_a_mistake_is_one_message_and_status_2(
    arguments: Sequence[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    need("timm")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("x,y\n1,2\n")
    assert in_process("bench", *arguments) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.csv"]


def test_help_shows_its_examples_and_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert in_process("bench", "--help") == 0
    shown = capsys.readouterr().out
    for example in (text.strip() for text in HELP.splitlines() if text.startswith("  upscale ")):
        assert example in shown
    for option in ("--amount", "--batch", "--memory-format", "--backend", "--seconds", "--plot", "--markdown"):
        assert option in shown


# -- the parts --------------------------------------------------------------------------------------------------------


def test_quartiles_and_ratios() -> None:
    assert checks.quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert checks.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
    # the machine slows down for two rounds: each round's ratio is still a half
    assert checks.paired_ratio([1.0, 5.0, 7.0], [2.0, 10.0, 14.0]) == 0.5


def test_denormals_are_found_in_weights_and_activations() -> None:
    tiny = torch.finfo(torch.float32).tiny
    assert checks.denormals(torch.tensor([0.0, tiny, tiny / 2, -tiny / 4, 1.0])) == 2
    assert checks.denormals(torch.arange(3)) == 0 and checks.denormals(torch.empty(0)) == 0
    layer = nn.Linear(2, 2)
    assert checks.denormal_weights(layer) == 0
    with torch.no_grad():
        layer.weight[0, 0] = 1e-40
    assert checks.denormal_weights(layer) == 1
    x = torch.full((4,), 1e-20)
    assert checks.denormal_activations(lambda: (x * 1e-20) + 1) == 0.5  # the product is, the sum is not
    assert checks.denormal_activations(lambda: x + 1) == 0


def test_warnings_come_with_noise_and_denormals_and_not_without() -> None:
    assert checks.warnings_of(10.0, 0.9, 1.02, 0, 0.0) == []
    assert checks.warnings_of(10.0, 0.9, None, None, None) == []
    (told,) = checks.warnings_of(10.0, 1.1, 1.0, 0, 0.0)
    assert told == "noisy: the interquartile range is more than 10 % of the median"
    assert checks.warnings_of(10.0, 0.0, 0.96, 0, 0.0) == ["noisy: the unpruned model against itself is 0.96"]
    assert checks.warnings_of(10.0, 0.0, 1.0, 3, 1e-3) == [
        "3 weights are denormal",
        "0.1 % of the activations are denormal",
    ]


def test_times_of_a_busy_machine_are_told_in_the_row() -> None:
    row = Row.blank("s", "m", "auto", SETTING, HERE)
    worker.note_times(row, [1.0, 2.0, 3.0, 4.0], [2.0, 4.0, 6.0, 8.0], control=1.1)
    assert (row.median_ms, row.best_ms, row.runs, row.ratio, row.control) == (2.5, 1.0, 4, 0.5, 1.1)
    assert row.iqr_ms == 1.5 and row.warning.count("noisy") == 2


def test_rows_on_disk_and_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "b.csv"
    (job,) = plan_jobs([Source("", SMALL)], [SETTING], None, ("unpruned", "auto"), QUICK, Limits())
    assert job.setting.size == 224 and Job.from_json(job.to_json()) == job
    (own,) = plan_jobs([Source("mine.csv", "x")], [SETTING], None, ("unpruned",), QUICK, Limits())
    assert own.setting.size == 0
    one, two = job.blanks()
    one.median_ms, one.warning = 1.5, "a, b"
    assert left([job], path, resume=True) == [job]
    write_rows(path, [one])
    assert left([job], path, resume=True) == [job]  # auto is missing
    write_rows(path, [one, two])
    assert read_rows(path) == [one, two]
    assert left([job], path, resume=True) == [] and left([job], path, resume=False) == [job]
    other = replace(one, torch="another")
    assert merged([one, two], [replace(two, runs=3), other]) == [one, replace(two, runs=3), other]
    path.write_text("x\n1\n")
    with pytest.raises(BadTableError, match="not a speed table"):
        read_rows(path)


def test_names_are_looked_up_in_order() -> None:
    need("timm")
    found = find_models(["resnet18", "resnet18d", "a.b:c", "resnet18"], ["torchvision", "timm"])
    assert found == [Source("torchvision", "resnet18"), Source("timm", "resnet18d"), Source("", "a.b:c")]


def filled(model: str, variant: str, ratio: float | None, setting: Setting = SETTING, **more: Any) -> Row:
    row = Row.blank("torchvision", model, variant, setting, HERE)
    row.ratio, row.median_ms = ratio, None if ratio is None else 20 * ratio
    return replace(row, **more)


def fixed() -> list[Row]:
    rows = []
    for model, scale in (("one", 1.0), ("two", 4.0)):
        rows.append(filled(model, "unpruned", 1.0, control=1.01, kernels=9))
        rows.append(filled(model, "gather", 0.4 * scale, copied_bytes=4_000_000, kernels=11))
        rows.append(filled(model, "auto", 0.2 * scale, copied_bytes=1_500, kernels=10, warning="noisy: very"))
        rows.append(filled(model, "contiguous", None, reason="not <here>", stage="make"))
        rows.append(filled(model, "ideal", 0.1 * scale))
    return rows


def test_markdown_of_a_fixed_table() -> None:
    text = document([*fixed(), filled("one", "unpruned", 1.0, replace(SETTING, batch=7))], "upscale bench one two")
    assert "Made by `upscale bench one two`." in text and "## a machine\n\ntorch 2, upscale 1\n" in text
    assert text.count("### ") == 2 and "batch 7, contiguous, eager, one thread, float32 on cpu" in text
    # ms, constrained to ideal, auto / ideal, baseline and gather, kB of gather and auto, three of kernels, noise
    assert "| one | 20 |  |  | 0.40 | 0.20 |  | 0.10 | 2.00 |  | 0.50 | 4,000 | 2 | 9 | 11 | 10 | 1.01 |" in text
    assert "| **mean** |  |  |  | 0.80 | 0.40 |  | 0.20 | 2.00 |  | 0.50 |" in text  # geometric: sqrt(0.4 * 1.6)
    assert "- 25 % b2 contiguous eager t1, auto: noisy: very (one, two)" in text
    assert "contiguous: not &lt;here> (one, two)" in text


def test_quotients_of_missing_variants_are_missing() -> None:
    (group, _) = grouped(fixed())
    assert quotient(group, "auto", "ideal") == pytest.approx(2)
    assert quotient(group, "auto", "baseline") is None and quotient(group, "contiguous", "auto") is None
    assert len(remarks(fixed())) == 2


# -- backends ---------------------------------------------------------------------------------------------------------


def test_compile_without_a_compiler_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UnavailableError, match="install g\\+\\+"):
        inductor(nn.Linear(3, 2), (torch.ones(1, 3),), SETTING)


def test_onnxruntime_gets_the_model_and_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = pytest.importorskip("onnx.reference")
    pytest.importorskip("onnxscript")
    seen: dict[str, Any] = {}

    class SessionOptions:
        pass

    class Session:
        """onnxruntime's interface over the evaluator that ONNX comes with."""

        def __init__(self, path: str, options: Any, providers: list[str]) -> None:
            self.evaluator = reference.ReferenceEvaluator(path)
            seen.update(threads=options.intra_op_num_threads, providers=providers)

        def get_inputs(self) -> list[Any]:
            return [type("Input", (), {"name": name}) for name in self.evaluator.input_names]

        def run(self, outputs: None, feed: dict[str, Any]) -> list[Any]:
            return self.evaluator.run(outputs, feed)

    stub = type(sys)("onnxruntime")
    stub.SessionOptions, stub.InferenceSession = SessionOptions, Session  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", stub)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 3)
    call = onnxruntime(model, (x,), replace(SETTING, threads=2))
    assert torch.allclose(torch.from_numpy(call(x)[0]), model(x), atol=1e-5)
    assert seen == {"threads": 2, "providers": ["CPUExecutionProvider"]}
    with pytest.raises(UnavailableError, match="one memory format"):
        onnxruntime(model, (x,), replace(SETTING, memory_format="channels_last"))
