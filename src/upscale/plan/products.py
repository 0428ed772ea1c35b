"""1x1 convolutions that can be carried out as matrix products.

A convolution copies a slice of channels unless it is one stretch of memory; a matrix product takes it as it lies, with
the distance from one row to the next.
"""

from __future__ import annotations

from torch.fx import Node

from ..aliases import argument, first_tensor
from ..flow.effects import Contract, size_of
from .model import ProductForm

#: The calls that a product takes beyond the convolution's own: views of its operands and of its result.
VIEWS = 2

_CONVOLUTIONS = frozenset(f"aten.conv{d}d.default" for d in (1, 2, 3))


def is_pointwise(node: Node, effect: Contract, dim: int) -> bool:
    """Whether a layer is a convolution that does the same at every place by itself, and reads channels of ``dim``."""
    if str(node.target) not in _CONVOLUTIONS or effect.groups != 1 or effect.operand is None or dim != 1:
        return False
    shape = effect.weight.meta["val"].shape
    if effect.in_dim != 1 or effect.operand.meta["val"].ndim != len(shape):
        return False
    return (
        all(size_of(s) == 1 for s in shape[2:])
        and _every(node, "stride", 1)
        and _every(node, "padding", 0)  # dilation means nothing to a kernel of one place
    )


def form_of(source: Node, dim: int) -> ProductForm:
    """The product that reads channels of ``source`` as they lie: rows of channels where these are neighbours in memory,
    else a matrix of whole planes for every example."""
    value = first_tensor(source.meta["val"])
    assert value is not None
    return "rows" if size_of(value.stride()[dim]) == 1 else "planes"


def _every(node: Node, name: str, wanted: int) -> bool:
    value = argument(node, name)
    return all(v == wanted for v in (value if isinstance(value, (list, tuple)) else (value,)))
