"""Every exception this library raises on purpose, one class per thing a caller may want to catch."""

from __future__ import annotations


class UpscaleError(Exception):
    """Base of all errors raised by upscale. The user's model is as it was before the call."""


class CaptureError(UpscaleError):
    """``torch.export`` could not turn the model into one graph, or the graph writes in a way we cannot undo."""


class InputError(UpscaleError):
    """An argument or an example input is missing, empty, of the wrong type, shape or value."""


class BudgetError(InputError):
    """A budget that no choice of channels meets."""


class UnsupportedModelError(UpscaleError):
    """The object given is not something that can be exported (ScriptModule, ``__slots__`` class, odd child names)."""


class NothingToPruneError(UpscaleError):
    """No channel of the model is zero, so there is nothing to remove."""


class NonFiniteError(UpscaleError):
    """A weight of the model is NaN or infinite: zero channels and equality mean nothing then."""


class ConstantOutputError(UpscaleError):
    """So much is masked that the model's output no longer depends on its input."""


class UnknownChannelError(UpscaleError):
    """A parameter name or a channel index that the model does not have."""


class RuleError(UpscaleError):
    """A flow rule was registered twice, under something that is not an operator, or returned nonsense."""


class VerificationError(UpscaleError):
    """The exported model does not compute what the masked model computes."""


class FileError(UpscaleError):
    """A file of a saved model cannot be written, or cannot be read: missing, damaged, of another kind or newer."""


class MismatchError(UpscaleError):
    """A model is not the one a file was made of, or a pruned module is no longer what ``export`` returned."""


class ConversionError(UpscaleError):
    """A pruned model cannot be written in another format: an operator does not exist there."""
