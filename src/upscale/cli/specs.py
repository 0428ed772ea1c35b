"""Models as they are named on the command line, built, with an example call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import upscale

from ..bench.models import DEFAULT_SIZE, default_suites, resized, runs
from ..errors import UpscaleError
from ..reproduce.models import KNOWN, ModelError, load_weights
from ..zoo.inputs import InputsError, parse_inputs
from ..zoo.nearest import did_you_mean
from ..zoo.subject import Subject
from ..zoo.suite_file import find_builder
from ..zoo.suites import Suite, SuiteError, load_suite
from .errors import UsageError

__all__ = ["FORMS", "find_subject"]

FORMS = """\
A MODEL is torchvision:resnet50, timm:convnext_tiny, hf:FOLDER (a folder that transformers saved),
package.module:function (or a class; called without arguments), or a .pt2 file of torch.export. resnet50 alone is looked
up in torchvision, then in timm. Weights are random unless --weights says otherwise."""

_SUITES = ("torchvision", "timm", "transformers")


def find_subject(spec: str, inputs: str | None = None, weights: Path | None = None, seed: int = 0) -> Subject:
    """The model that ``spec`` names, in eval mode, and an example call.

    ``inputs``: the call as ``upscale zoo`` writes it; None: images of 224 pixels where the model takes images, else
    what the model's own library says. ``weights``: a file of tensors.

    Raises:
        UsageError: there is no such model, it cannot be built, or it does not take the inputs.
    """
    try:
        subject = _built(spec, seed)
        if weights is not None:
            load_weights(spec, subject.model, weights)
        given = None if inputs is None else parse_inputs(inputs, seed)
    except (ModelError, SuiteError, InputsError) as error:
        raise UsageError(str(error)) from error
    subject.model.eval()
    if given is not None:
        subject.inputs = given
    if not subject.inputs:
        raise UsageError(f"{spec}: say what it is called with, for instance --inputs 1x3x224x224")
    try:
        subject.call(subject.model)
    except Exception as error:  # a model of the user's may raise anything
        raise UsageError(f"{spec} does not take these inputs: {_first(error)}; see --inputs") from error
    return subject


def _built(spec: str, seed: int) -> Subject:
    kind, colon, name = spec.partition(":")
    if spec.endswith(".pt2"):
        return _from_file(Path(spec))
    if not colon:
        return _bare(spec, seed)
    if kind in _SUITES:
        return _enlarged(_of_suite(kind, load_suite(kind), name, seed))
    return _BUILDERS.get(kind, _own)(name if kind in _BUILDERS else spec, seed)


def _of_suite(kind: str, suite: Suite, name: str, seed: int) -> Subject:
    known = [*suite.names(), *suite.others()]
    if name not in known:
        raise UsageError(f"{kind} has no model {name!r}{_near(name, known)}")
    return suite.build(name, seed)


def _enlarged(subject: Subject) -> Subject:
    """Images of the usual size in place of the small ones of ``upscale zoo``, where the model takes them."""
    subject.model.eval()
    larger = resized(subject.inputs, DEFAULT_SIZE)
    return Subject(subject.model, larger) if runs(subject, larger) else subject


def _bare(name: str, seed: int) -> Subject:
    if name in KNOWN:
        torch.manual_seed(seed)
        size = KNOWN[name].view.size
        return Subject(KNOWN[name].build(), parse_inputs(f"2x3x{size}x{size}", seed))
    known: list[str] = list(KNOWN)
    for kind in default_suites():
        suite = load_suite(kind)
        names = [*suite.names(), *suite.others()]
        if name in names:
            return _enlarged(suite.build(name, seed))
        known += names
    places = " and ".join(default_suites()) or "torchvision and timm, which are not installed"
    raise UsageError(f"no model {name!r} in {places}{_near(name, known)}")


def _near(name: str, known: list[str]) -> str:
    hint = did_you_mean(name, known)
    return f": {hint}" if hint else "; write package.module:function for one of your own"


def _own(spec: str, seed: int) -> Subject:
    torch.manual_seed(seed)
    try:
        model = find_builder(spec, Path.cwd())()
    except Exception as error:  # it runs the user's code
        raise UsageError(f"cannot build {spec}: {_first(error)}") from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{spec} returned {type(model).__name__}, not an nn.Module")
    return _enlarged(Subject(model, parse_inputs("2x3x64x64", seed)))


def _from_folder(folder: str, seed: int) -> Subject:
    """A model of transformers with the weights in its folder; nothing is downloaded, no code of the folder is run."""
    if not (Path(folder) / "config.json").is_file():
        raise UsageError(f"hf:{folder}: there is no {Path(folder) / 'config.json'}; give a folder of save_pretrained()")
    try:
        import transformers
    except ImportError as error:
        raise UsageError("hf: needs transformers: pip install 'upscale-pruning[zoo]'") from error
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
        model = kind.from_pretrained(folder, use_safetensors=True, **options)
    except Exception as error:  # every kind of bad folder raises something else
        raise UsageError(f"hf:{folder}: {_first(error)}") from error
    return Subject(model, _call_of(model, config, seed))


def _call_of(model: Any, config: Any, seed: int) -> dict[str, torch.Tensor]:
    """An example for the model's main input; empty where its shape is not known."""
    main = getattr(model, "main_input_name", "")
    size = getattr(config, "image_size", None)
    if main == "pixel_values" and isinstance(size, int):
        return parse_inputs(f"pixel_values=2x{getattr(config, 'num_channels', 3)}x{size}x{size}", seed)  # type: ignore[return-value]
    if main == "input_ids" and isinstance(getattr(config, "vocab_size", None), int):
        return parse_inputs(f"input_ids=int{config.vocab_size}:2x16 attention_mask=ones:2x16", seed)  # type: ignore[return-value]
    return {}


def _from_file(path: Path) -> Subject:
    """A program of ``torch.export`` and the example that it was made with, as far as the file has it."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        program = torch.export.load(path)
    except Exception as error:
        raise UsageError(f"cannot read {path}: {_first(error)}") from error
    args, kwargs = program.example_inputs or ((), {})
    if not (args or kwargs):
        hint = "files of upscale.save hold none; name the model that it was made of"
        raise UsageError(f"{path} has no example inputs in it ({hint})")
    try:
        model = upscale.PruningManager(program.module()).compute(kwargs or args).trace()
    except UpscaleError as error:
        raise UsageError(f"{path}: {error}") from error
    return Subject(model, kwargs or args)


def _first(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


_BUILDERS: dict[str, Callable[[str, int], Subject]] = {"hf": _from_folder}
