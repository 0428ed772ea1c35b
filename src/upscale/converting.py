"""A pruned model in ONNX, for runtimes other than torch."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.utils import _pytree as pytree

from .errors import ConversionError, FileError, InputError
from .recipe import Step
from .saving import unchanged
from .saving.program import check_same_outputs, example_call, reexported
from .saving.state import named_tensors

__all__ = ["to_onnx"]

_TOLERANCE = 1e-4  # relative, between torch and ONNX Runtime in float32
_HALF = 2e-2


def to_onnx(model: nn.Module, path: str | os.PathLike[str], *, opset: int | None = None, check: bool = True) -> None:
    """Write a pruned model as an ONNX file, whole or not at all. A file that is there already is replaced.

    The sizes that are free in ``model`` stay free, the batch to begin with. Weights of more than 2 GB go into a second
    file, ``path`` with ``.data`` behind it, which must stay beside the first.

    Args:
        model: what :func:`upscale.export` and its like returned, or :func:`upscale.load` from ``*.safetensors``.
        path: of the file, ``*.onnx``.
        opset: version of the ONNX operators; None: the one torch recommends.
        check: run the file in ONNX Runtime on two random inputs, of different batch sizes where the batch is free,
            before it takes its place; outputs must agree with ``model`` to a relative error of 1e-4 (2e-2 in half
            precision).

    Raises:
        InputError: ``path`` ends otherwise, a package is missing, or there are weights in bfloat16, which cannot be
        checked. MismatchError: ``model`` is no pruned model, or was changed. ConversionError: an operator does not
        exist in ONNX, or not in this opset. VerificationError: ONNX Runtime computes something else. FileError: the
        file cannot be written.
    """
    target = Path(path)
    if target.suffix != ".onnx":
        raise InputError(f"{str(target)!r} must end in .onnx")
    _check_packages(("onnx", "onnxscript", "onnxruntime") if check else ("onnx", "onnxscript"))
    pruned, recipe = unchanged(model)
    step = recipe.steps[-1]
    if check and torch.bfloat16 in _dtypes(pruned):
        raise InputError("ONNX Runtime takes no bfloat16 from here: write the file unchecked with check=False")
    program = reexported(pruned, step)
    _check_outputs(program)
    converted = _converted(program, opset)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as text:
            draft = Path(text) / target.name
            with _quiet():
                converted.save(draft)
            if check:
                _check(pruned, step, draft)
            for file in sorted(Path(text).iterdir(), key=lambda file: file.name == target.name):
                file.replace(target.parent / file.name)  # the weights first: the file that names them comes last
    except OSError as error:
        raise FileError(f"{str(target)!r} cannot be written: {error}") from error


def _check_packages(needed: tuple[str, ...]) -> None:
    if missing := [name for name in needed if find_spec(name) is None]:
        hint = "" if missing != ["onnxruntime"] else ", or write the file unchecked with check=False"
        raise InputError(f"{', '.join(missing)} missing: pip install 'upscale-pruning[onnx]'{hint}")


def _check_outputs(program: ExportedProgram) -> None:
    """An ONNX file gives tensors, and sizes as tensors."""
    for spec in program.graph_signature.output_specs:
        if isinstance(spec.arg, ConstantArgument) and spec.arg.value is not None:
            raise ConversionError(
                f"the model returns {spec.arg.value!r}, which is the same for every input, and ONNX files hold tensors "
                "alone: export a model that returns its tensors"
            )


def _converted(program: ExportedProgram, opset: int | None) -> Any:
    """Torch's ONNX program."""
    try:
        with _quiet():
            converted = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
    except Exception as error:
        raise ConversionError(f"torch cannot write the model as ONNX{_of(opset)}: {_cause(error)}") from error
    assert converted is not None
    made = converted.model.opset_imports.get("")
    if opset is not None and made != opset:
        raise ConversionError(
            f"the model cannot be written{_of(opset)}: torch writes opset {made}, and an operator in it has no form in "
            f"the other; leave opset out, or ask for {made}"
        )
    return converted


def _dtypes(pruned: nn.Module) -> set[torch.dtype]:
    """Those of the weights: the inputs may be whole numbers alone."""
    return {tensor.dtype for _, tensor in named_tensors(pruned)}


def _advice(pruned: nn.Module) -> str:
    """It has few operators in other types than float32."""
    if not any(dtype.is_floating_point and dtype != torch.float32 for dtype in _dtypes(pruned)):
        return ""
    return " in its type of numbers (call float() on it first, or write the file unchecked with check=False)"


def _of(opset: int | None) -> str:
    return "" if opset is None else f" in opset {opset}"


def _cause(error: BaseException) -> str:
    """The innermost error, in one line: torch wraps it in several of its own."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:400]}"


@torch.no_grad()
def _check(pruned: fx.GraphModule, step: Step, path: Path) -> None:
    """Compare a file with the model on random inputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ConversionError(f"ONNX Runtime does not take the model{_advice(pruned)}: {_cause(error)}") from error
    names = [entry.name for entry in session.get_inputs()]
    free = not all(isinstance(size, int) for entry in session.get_inputs() for size in entry.shape[:1])
    half = torch.float16 in _dtypes(pruned)
    flags = {module: module.training for module in pruned.modules()}
    pruned.eval()
    try:
        for seed, batch in ((0, None), (1, 3)) if free else ((0, None),):
            example = example_call(pruned, step, seed, batch)
            if len(names) != len(example.leaves):
                raise ConversionError(f"the ONNX file takes {len(names)} inputs, the model {len(example.leaves)}")
            feed = {name: leaf.cpu().numpy() for name, leaf in zip(names, example.leaves, strict=True)}
            outputs = [torch.from_numpy(value) for value in session.run(None, feed)]
            expected = pytree.tree_map(_as_in_file, pruned(*example.args, **example.kwargs))
            check_same_outputs(expected, outputs, "the ONNX file", _HALF if half else _TOLERANCE)
    finally:
        for module, training in flags.items():
            module.training = training


def _as_in_file(value: Any) -> Any:
    """Sizes that a model returns are tensors there."""
    return value.cpu() if isinstance(value, torch.Tensor) else torch.tensor(value) if type(value) is int else value


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of its steps, in several ways."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
