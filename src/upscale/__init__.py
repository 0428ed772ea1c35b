"""upscale: a channel-level compiler for PyTorch. Mask channels with anything, export a smaller model that computes
the same. See :func:`export` and the paper's two classes, :class:`MaskingManager` and :class:`PruningManager`."""

from . import importance, interop, regularize
from .converting import to_onnx
from .errors import (
    BudgetError,
    CaptureError,
    ConstantOutputError,
    ConversionError,
    FileError,
    InputError,
    MismatchError,
    NonFiniteError,
    NothingToPruneError,
    RuleError,
    UnknownChannelError,
    UnsupportedModelError,
    UpscaleError,
    VerificationError,
)
from .exporting import export
from .importance import ActivationMagnitude, HRank, Taylor
from .inspection import inspect
from .managers import PruningManager
from .mask_objects import load_masks, save_masks
from .masking import MaskingManager
from .one_call import mask, prune
from .plan import Target
from .recalibrating import recalibrate
from .repairing import OBS, RepairReport, RepairWarning, repair
from .rules import rule
from .saving import load, save
from .segment_objects import Segment
from .tuning import tune

__version__ = "0.1.0"

__all__ = [
    "OBS",
    "ActivationMagnitude",
    "BudgetError",
    "CaptureError",
    "ConstantOutputError",
    "ConversionError",
    "FileError",
    "HRank",
    "InputError",
    "MaskingManager",
    "MismatchError",
    "NonFiniteError",
    "NothingToPruneError",
    "PruningManager",
    "RepairReport",
    "RepairWarning",
    "RuleError",
    "Segment",
    "Target",
    "Taylor",
    "UnknownChannelError",
    "UnsupportedModelError",
    "UpscaleError",
    "VerificationError",
    "export",
    "importance",
    "inspect",
    "interop",
    "load",
    "load_masks",
    "mask",
    "prune",
    "recalibrate",
    "regularize",
    "repair",
    "rule",
    "save",
    "save_masks",
    "to_onnx",
    "tune",
]
