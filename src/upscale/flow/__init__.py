"""Flow analysis: labels, constants and liveness of every channel of a captured program."""

from . import rules_compute, rules_movement, rules_product, rules_spatial  # noqa: F401  (fills the table)
from .analysis import analyse
from .liveness import analyse_flow
from .model import Flow, FlowNode, Link
from .registry import rule

__all__ = ["Flow", "FlowNode", "Link", "analyse", "analyse_flow", "rule"]
