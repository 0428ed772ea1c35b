"""Flow rules of your own: tell the compiler what an operator it does not know does to channels.

A rule is a function from one call (:class:`Op`) to one effect, registered for an operator overload::

    @upscale.rule(torch.ops.mylib.swish.default)
    def swish(op):
        return rules.Pointwise(op.tensors)

:class:`Op` gives the call's arguments by their schema names (``op["x"]``), shapes (``op.shape(node)``) and
the values of parameters (``op.value_of(node)``). The effects, by what they say of the channels:

==================  ===================================================================================================
:class:`Contract`   new channels are made of all channels of an operand by a weight: convolution, linear
:class:`Pointwise`  operands pair element by element, with broadcasting: their channels become one
:class:`PerChannel` every channel is computed from the same channel of the operand: norms, pooling, depthwise filters
:class:`Aligned`    the same for several operands that pair along one dimension only: attention over heads
:class:`Folded`     every channel is made of a few of the operand's, all in the same way: a gated linear unit
:class:`Mixing`     every channel depends on all, and permuting the operand permutes the result: layer norm
:class:`Movement`   elements only move: the operator is run on labels to see where to
:class:`Concat`     operands one after the other
:class:`Pad`        constant padding
:class:`Barrier`    anything else: all channels stay, and the report says why
==================  ===================================================================================================

A rule without a ``constant`` function claims nothing about channels that hold one value: they are kept. Whatever a rule
says, the exported model is compared with the masked one before it is returned.
"""

from .flow.effects import (
    Aligned,
    Barrier,
    Channels,
    Concat,
    Constants,
    Contract,
    Effect,
    Folded,
    Mixing,
    Movement,
    Op,
    Pad,
    PerChannel,
    Pointwise,
)
from .flow.registry import rule

__all__ = [
    "Aligned",
    "Barrier",
    "Channels",
    "Concat",
    "Constants",
    "Contract",
    "Effect",
    "Folded",
    "Mixing",
    "Movement",
    "Op",
    "Pad",
    "PerChannel",
    "Pointwise",
    "rule",
]
