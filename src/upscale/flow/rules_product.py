"""Rules for products of tensors: matrix products, einsum, attention. A product is read as an einsum: a letter for each
dimension."""

from __future__ import annotations

from string import ascii_letters

import numpy as np
from torch.fx import Node

from .effects import Aligned, Barrier, Contract, Effect, Folded, Op, PerChannel
from .registry import names, rule


@rule(*names("aten", "matmul bmm mm"))
def matrix_product(op: Op) -> Effect:
    left, right = op.args["self"], op.args.get("other", op.args.get("mat2"))
    assert isinstance(left, Node) and isinstance(right, Node)
    return _product(op, left, right, *_matmul_letters(op.rank(left), op.rank(right)))


def _matmul_letters(left: int, right: int) -> tuple[str, str, str]:
    """Letters of both operands and of the result of ``matmul``: k is contracted, m and n are free."""
    batch = ascii_letters[26:]
    outer = max(left, right) - 2
    a = batch[max(outer - (left - 2), 0) : max(outer, 0)] + ("mk" if left > 1 else "k")
    b = batch[max(outer - (right - 2), 0) : max(outer, 0)] + ("kn" if right > 1 else "k")
    return a, b, batch[: max(outer, 0)] + ("m" if left > 1 else "") + ("n" if right > 1 else "")


@rule("aten.addmm.default")
def add_and_multiply(op: Op) -> Effect:
    x, weight, bias = op["mat1"], op["mat2"], op["self"]
    plain = op.args.get("beta", 1) == 1 and op.args.get("alpha", 1) == 1
    if weight.op != "get_attr" or bias.op != "get_attr" or not plain or op.shape(bias) != op.shape(weight)[1:]:
        return Barrier("a matrix product of activations with something added", op.tensors)
    return Contract(x, 1, 1, weight, 0, 1, bias, exact=True)


@rule("aten.einsum.default")
def einsum(op: Op) -> Effect:
    equation, tensors = op["equation"].replace(" ", ""), tuple(op["tensors"])
    if "->" not in equation or "." in equation or len(tensors) != 2:
        return Barrier("einsum over other than two tensors, or without explicit letters", op.tensors)
    inputs, result = equation.split("->")
    a, b = inputs.split(",")
    if any(len(set(letters)) != len(letters) for letters in (a, b, result)):
        return Barrier("einsum over a diagonal", op.tensors)
    return _product(op, *tensors, a, b, result)


def _product(op: Op, left: Node, right: Node, a: str, b: str, result: str) -> Effect:
    if left is right:
        return Barrier("the product of a tensor with itself", op.tensors)
    for x, weight, own, others in ((left, right, a, b), (right, left, b, a)):
        if weight.op == "get_attr" and op.rank(weight) == 2 and x.op != "get_attr":
            return _with_weight(op, x, weight, own, others, result)
    found = [(c.dim, letters) for n, letters in ((left, a), (right, b)) if (c := op.channels_of(n)) and not c.weak]
    letter = next((letters[dim] for dim, letters in found if letters[dim] in result), None)
    if letter is None:
        return Barrier("the product of two activations, over their channels", op.tensors)
    return Aligned(
        tuple((n, letters.index(letter)) for n, letters in ((left, a), (right, b)) if letter in letters),
        result.index(letter),
    )


def _with_weight(op: Op, x: Node, weight: Node, own: str, others: str, result: str) -> Effect:
    """A linear layer spelled as a product: the letter both share is contracted, the weight's other one is new."""
    shared = [letter for letter in others if letter in own and letter not in result]
    new = [letter for letter in others if letter in result and letter not in own]
    if len(shared) != 1 or len(new) != 1:
        return Barrier("a product with a parameter that is not a linear map of one dimension", op.tensors)
    inner, outer = others.index(shared[0]), others.index(new[0])
    return Contract(x, own.index(shared[0]), result.index(new[0]), weight, inner, outer, None, exact=True)


@rule("aten.scaled_dot_product_attention.default")
def attention(op: Op) -> Effect:
    query, key, value, mask = op["query"], op["key"], op["value"], op.args.get("attn_mask")
    rank, channels = op.rank(query), op.channels_of(value)
    if channels is not None and channels.dim == rank - 1 and op.channels_of(query) is None:
        return PerChannel(value, rank - 1, rank - 1)
    head = rank - 3
    if head < 1 or len({query, key, value}) < 3:
        return Barrier("attention without a dimension of heads", op.tensors)
    operands = [(query, head), (key, head), (value, head)]
    if isinstance(mask, Node) and op.rank(mask) == rank and op.shape(mask)[head] > 1:
        operands.append((mask, head))
    return Aligned(tuple(operands), head)


@rule("aten.glu.default")
def gated_linear_unit(op: Op) -> Effect:
    x = op["self"]
    dim, half = op["dim"] % op.rank(x), op.shape(x)[op["dim"]] // 2
    channels = op.channels_of(x)
    if channels is not None and channels.dim != dim:
        return PerChannel(x, channels.dim, channels.dim)
    return Folded(x, dim, dim, np.stack([np.arange(half), np.arange(half) + half], axis=1))
