"""Models by name: of the suites of ``upscale zoo``, or any function of one's own as ``package.module:function``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..zoo.nearest import did_you_mean
from ..zoo.randomise import randomise
from ..zoo.subject import Inputs, Subject, each_tensor, rebatched
from ..zoo.suite_file import find_builder
from ..zoo.suites import BUILT_IN, Suite, load_suite
from .rows import Setting

#: Suites whose images may be of any size.
RESIZED = ("torchvision", "timm", "")
DEFAULT_SIZE = 224


class UnknownModelError(Exception):
    """Names that no chosen suite has; the message has near matches."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from. ``suite``: a built-in one or a file; "": ``model`` is ``package.module:function``."""

    suite: str
    model: str

    @property
    def label(self) -> str:
        """The suite's name in the table."""
        return Path(self.suite).name

    @property
    def resized(self) -> bool:
        """Whether its images may be of any size."""
        return self.suite in RESIZED


def default_suites() -> list[str]:
    """Those of image models that are installed."""
    return [name for name in ("torchvision", "timm") if find_spec(BUILT_IN[name][1])]


def find_models(names: Sequence[str], suites: Sequence[str]) -> list[Source]:
    """A source for each name: the first suite that has it.

    Raises ``SuiteError`` for a bad suite and ``UnknownModelError``, with near matches, for names that none has.
    """
    loaded = [(which, load_suite(which)) for which in suites]
    found, unknown = [], []
    for name in dict.fromkeys(names):
        suite = next((which for which, suite in loaded if _has(suite, name)), None)
        if suite is not None:
            found.append(Source(suite, name))
        elif ":" in name:
            found.append(Source("", name))
        else:
            unknown.append(name)
    if unknown:
        known = [name for _, suite in loaded for name in (*suite.names(), *suite.others())]
        raise UnknownModelError("\n".join(_complaint(name, known, suites) for name in unknown))
    return found


def _has(suite: Suite, name: str) -> bool:
    return name in suite.names() or name in suite.others()


def _complaint(name: str, known: Sequence[str], suites: Sequence[str]) -> str:
    hint = did_you_mean(name, known) or "write package.module:function for a model of your own"
    return f"no model {name!r} in {', '.join(suites) or 'any suite'}: {hint}"


def build(source: Source, setting: Setting) -> tuple[Subject, bool]:
    """The model with random weights and the call to be timed; and whether its images are of the size asked for.

    Weights keep the signal up and batch norms have statistics near what they see, as in ``upscale zoo``: no activation
    dies away. A model that does not take images of that size is given those of its suite.
    """
    subject = _built(source, setting)
    subject.model.eval().requires_grad_(False)
    asked = resized(subject.inputs, setting.size) if setting.size else subject.inputs
    fits = runs(subject, asked)
    subject.inputs = asked if fits else subject.inputs
    randomise(subject, setting.seed)  # at the size that is timed: statistics depend on it
    inputs = rebatched(subject.inputs, setting.batch, setting.seed)
    return _converted(Subject(subject.model, inputs), setting), fits


def _built(source: Source, setting: Setting) -> Subject:
    if source.suite:
        return load_suite(source.suite).build(source.model, setting.seed)
    torch.manual_seed(setting.seed)
    model = find_builder(source.model, Path.cwd())()
    if not isinstance(model, nn.Module):
        raise TypeError(f"{source.model} returned {type(model).__name__}, not an nn.Module")
    return Subject(model, (torch.randn(2, 3, 64, 64),))


def resized(inputs: Inputs, size: int) -> Inputs:
    """Images of ``size`` pixels; whatever is no image stays."""

    def one(tensor: Tensor) -> Tensor:
        if tensor.ndim != 4 or not tensor.is_floating_point():
            return tensor
        return torch.randn(*tensor.shape[:2], size, size, generator=torch.Generator().manual_seed(0))

    return each_tensor(inputs, one)


def runs(subject: Subject, inputs: Inputs) -> bool:
    """Whether the model accepts these inputs."""
    try:
        subject.call(subject.model, inputs)
    except Exception:
        return False
    return True


def _converted(subject: Subject, setting: Setting) -> Subject:
    """Model and inputs in the dtype, on the device and in the memory format of the setting."""
    subject = subject.to(getattr(torch, setting.dtype))
    device = torch.device(setting.device)
    inputs = each_tensor(subject.inputs, lambda t: laid_out(t.to(device), setting))
    return Subject(to_format(subject.model.to(device), setting), inputs)


def memory_format(setting: Setting) -> torch.memory_format:
    """The setting's as torch has it."""
    return {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[setting.memory_format]


def laid_out(tensor: Tensor, setting: Setting) -> Tensor:
    """An image in the setting's memory format; other tensors have but one."""
    return tensor.contiguous(memory_format=memory_format(setting)) if tensor.ndim == 4 else tensor


def to_format(model: nn.Module, setting: Setting) -> nn.Module:
    """The model's four-dimensional weights in the setting's memory format, in place."""
    for parameter in model.parameters():
        if parameter.ndim == 4:
            parameter.data = laid_out(parameter.data, setting)
    return model
