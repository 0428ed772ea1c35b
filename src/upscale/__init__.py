"""upscale: a channel-level compiler for PyTorch. Mask channels with anything, export a smaller model that computes
the same. See :func:`export` and the paper's two classes, :class:`MaskingManager` and :class:`PruningManager`."""

from . import importance, regularize
from .errors import (
    CaptureError,
    ConstantOutputError,
    InputError,
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
from .managers import PruningManager
from .mask_objects import load_masks, save_masks
from .masking import MaskingManager
from .one_call import mask, prune
from .plan import Target
from .repairing import RepairReport, RepairWarning, repair
from .rules import rule
from .tuning import tune

__version__ = "0.1.0"

__all__ = [
    "ActivationMagnitude",
    "CaptureError",
    "ConstantOutputError",
    "HRank",
    "InputError",
    "MaskingManager",
    "NonFiniteError",
    "NothingToPruneError",
    "PruningManager",
    "RepairReport",
    "RepairWarning",
    "RuleError",
    "Target",
    "Taylor",
    "UnknownChannelError",
    "UnsupportedModelError",
    "UpscaleError",
    "VerificationError",
    "export",
    "importance",
    "load_masks",
    "mask",
    "prune",
    "regularize",
    "repair",
    "rule",
    "save_masks",
    "tune",
]
