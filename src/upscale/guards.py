"""Conditions on input sizes under which a captured graph is valid, as small expressions that can be emitted.

``torch.export`` specialises what it must and proves the rest from the example; an exported model must raise, not
answer wrongly, where one of those facts does not hold. A :class:`Guard` is such a fact.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_PROBES = 4096  # sizes up to this are tried when a set of conditions is condensed into a lower bound

_LARGE = (6000, 10007, 65536, 1 << 20)

# On a GPU torch takes cuDNN's batch norm up to so many examples. That decides how something is computed, not what.
_CUDNN = (65535, 880801)


@dataclass(frozen=True)
class Size:
    """An expression in input sizes: a size (``leaf``, ``dim``) or an operator on expressions and integers."""

    leaf: int = -1
    dim: int = -1
    op: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()

    def _make(self, op: Callable[..., Any], *args: Any) -> Size:
        return Size(op=op, args=args)

    def __add__(self, other: Any) -> Size:
        return self._make(operator.add, self, other)

    def __radd__(self, other: Any) -> Size:
        return self._make(operator.add, other, self)

    def __sub__(self, other: Any) -> Size:
        return self._make(operator.sub, self, other)

    def __rsub__(self, other: Any) -> Size:
        return self._make(operator.sub, other, self)

    def __mul__(self, other: Any) -> Size:
        return self._make(operator.mul, self, other)

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Size:
        return self._make(operator.floordiv, self, other)

    def __mod__(self, other: Any) -> Size:
        return self._make(operator.mod, self, other)

    def __pow__(self, other: Any) -> Size:
        return self._make(operator.pow, self, other)

    def __neg__(self) -> Size:
        return self._make(operator.neg, self)

    def __lt__(self, other: Any) -> Size:
        return self._make(operator.lt, self, other)

    def __le__(self, other: Any) -> Size:
        return self._make(operator.le, self, other)

    def __gt__(self, other: Any) -> Size:
        return self._make(operator.gt, self, other)

    def __ge__(self, other: Any) -> Size:
        return self._make(operator.ge, self, other)

    def __bool__(self) -> bool:
        raise TypeError("a size expression has no truth value before the sizes are known")

    def same(self, other: Any) -> Size:
        """The expression ``self == other`` (``==`` itself stays structural, for dataclass equality)."""
        return self._make(operator.eq, self, other)

    def sizes(self) -> set[tuple[int, int]]:
        """The (leaf, dim) pairs that occur in the expression."""
        if self.op is None:
            return {(self.leaf, self.dim)}
        return set().union(*(a.sizes() for a in self.args if isinstance(a, Size)))

    def value(self, sizes: Mapping[tuple[int, int], Any]) -> Any:
        """Evaluate with numbers or integer tensors for the sizes."""
        if self.op is None:
            return sizes[(self.leaf, self.dim)]
        values = [a.value(sizes) if isinstance(a, Size) else a for a in self.args]
        if self.op in (operator.mod, operator.floordiv) and isinstance(values[1], torch.Tensor):
            values[1] = torch.where(values[1] == 0, 1, values[1])  # among many sizes tried at once, one may give zero
        return self.op(*values)


@dataclass(frozen=True)
class Guard:
    """A condition that must hold for every call, and what to say where it does not."""

    condition: Size
    message: str


def accepted(guards: Iterable[Guard], shapes: Sequence[Sequence[int]]) -> bool:
    """Whether inputs of these shapes pass."""
    sizes = {(leaf, dim): size for leaf, shape in enumerate(shapes) for dim, size in enumerate(shape)}
    return all(bool(guard.condition.value(sizes)) for guard in guards)


def _hint(dim: int) -> str:
    if dim == 0:
        return "export again with an example whose dimension 0 is a batch, or pass dynamic_shapes"
    return "export again with dynamic_shapes='spatial'" if dim >= 2 else "export again with dynamic_shapes"


def _is_number(value: Any) -> bool:
    """Whether a size is known: an int, or one of sympy's, which is asked and not imported (half of a second)."""
    return isinstance(value, int) or bool(getattr(value, "is_Integer", False))


def fixed_size(size: Any) -> int | None:
    """The number that a captured size is, or None where it was left free."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression) if _is_number(expression) else None


def size_guards(
    values: Sequence[torch.Tensor], names: Sequence[str], ranges: Mapping[Any, Any]
) -> tuple[list[Guard], list[str]]:
    """Guards for every size of the captured inputs that is static, bounded, equal to another one, or derived.

    ``values`` are the fake input tensors as export left them, ``ranges`` the bounds of its symbols. The second result
    names the relations that could not be written down.
    """
    guards: list[Guard] = []
    missing: list[str] = []
    known: dict[Any, Size] = {}
    derived: list[tuple[int, int, Any]] = []
    for leaf, value in enumerate(values):
        for dim, size in enumerate(value.shape):
            here, text = Size(leaf, dim), f"upscale: input {names[leaf]!r} "
            number = fixed_size(size)
            if number is not None:
                message = f"was captured with size {number} in dimension {dim} and takes no other; {_hint(dim)}"
                guards.append(Guard(here.same(number), text + message))
                continue
            expression: Any = size.node.expr  # type: ignore[attr-defined]
            if not expression.is_Symbol:
                derived.append((leaf, dim, expression))
            elif expression not in known:
                known[expression] = here
                guards.extend(_bounds(here, ranges.get(expression), text))
            else:
                other = known[expression]
                message = (
                    f"must have in dimension {dim} the size that {names[other.leaf]!r} has in dimension {other.dim}"
                )
                guards.append(Guard(here.same(other), text + message))
    for leaf, dim, expression in derived:
        guard = _derived_guard(Size(leaf, dim), expression, known, names)
        if guard is None:
            missing.append(f"input {names[leaf]!r}, dimension {dim}: size {expression}")
        else:
            guards.extend(guard)
    return guards, missing


def _bounds(here: Size, values: Any, text: str) -> list[Guard]:
    """The range that torch holds a free size to. Its lower bound of two stands for one as well."""
    guards = []
    lower: Any = getattr(values, "lower", 0)
    upper: Any = getattr(values, "upper", None)
    if _is_number(lower) and lower > 2:
        guards.append(Guard(here >= int(lower), f"{text}must have at least size {lower} in dimension {here.dim}"))
    if _is_number(upper) and upper < 1 << 40 and upper not in _CUDNN:
        guards.append(Guard(here <= int(upper), f"{text}must have at most size {upper} in dimension {here.dim}"))
    return guards


def _derived_guard(here: Size, expression: Any, known: dict[Any, Size], names: Sequence[str]) -> list[Guard] | None:
    """``here`` has the size ``expression``; a symbol that nothing else defines is defined by it."""
    text = f"upscale: input {names[here.leaf]!r} was captured with size {expression} in dimension {here.dim}"
    unknown = [symbol for symbol in expression.free_symbols if symbol not in known]
    if not unknown:
        size = _from_sympy(expression, known)
        return None if size is None else [Guard(here.same(size), f"{text} and the other sizes do not match")]
    if len(expression.free_symbols) != 1:
        return None
    (symbol,) = unknown
    polynomial = expression.as_poly(symbol) if expression.is_polynomial(symbol) else None
    if polynomial is None or polynomial.degree() != 1:
        return None
    factor, offset = (int(c) for c in polynomial.all_coeffs())
    known[symbol] = (here - offset) // factor
    return [Guard(((here - offset) % factor).same(0), text)]


def _from_sympy(expression: Any, known: Mapping[Any, Size]) -> Any:
    """A sympy size expression over ``known`` symbols as :class:`Size` (or int); None where it has another form."""
    if _is_number(expression):
        return int(expression)
    if expression.is_Symbol:
        return known.get(expression)
    operators = {"Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv}
    operators |= {"Mod": operator.mod, "PythonMod": operator.mod, "Pow": operator.pow}
    op = operators.get(type(expression).__name__)
    parts = [_from_sympy(argument, known) for argument in expression.args]
    if op is None or any(part is None for part in parts):
        return None
    result = parts[0]
    for part in parts[1:]:
        result = op(result, part)
    return result


class _Sized:
    """Stands for an input tensor while torch's guard text is evaluated."""

    def __init__(self, leaf: int, dims: int) -> None:
        self.leaf, self.dims = leaf, dims

    def size(self) -> list[_Term]:
        return [_Term(self.leaf, dim) for dim in range(self.dims)]


@dataclass(frozen=True, eq=False)
class _Term(Size):
    """A size whose ``==`` and ``!=`` build expressions too, for evaluating guard text."""

    def _make(self, op: Callable[..., Any], *args: Any) -> Size:
        return _Term(op=op, args=args)

    def __eq__(self, other: Any) -> Any:
        return self._make(operator.eq, self, other)

    def __ne__(self, other: Any) -> Any:
        return self._make(operator.ne, self, other)

    __hash__ = object.__hash__


def text_guards(
    texts: Iterable[str], values: Sequence[torch.Tensor], names: Sequence[str], parameter: str
) -> tuple[list[Guard], list[str]]:
    """Guards for what torch proved of the free sizes, given as Python text over ``L[parameter][i].size()[j]``.

    Torch records a condition for every decision any kernel took: most say that a size is not one. All conditions on a
    single size that hold from some bound on become that one bound; a condition on several sizes that holds on every
    probed combination is dropped; the rest are kept as they are. The second result lists texts that could not be read.
    """
    free = {
        (leaf, dim)
        for leaf, value in enumerate(values)
        for dim, size in enumerate(value.shape)
        if fixed_size(size) is None
    }
    scope = {"L": {parameter: [_Sized(leaf, value.dim()) for leaf, value in enumerate(values)]}}
    single: dict[tuple[int, int], list[tuple[Size, str]]] = {}
    joint: list[tuple[Size, str]] = []
    unread: list[str] = []
    for text in dict.fromkeys(texts):
        try:
            condition = eval(text, {"__builtins__": {}}, scope)
        except Exception:
            if any(f"[{leaf}].size()[{dim}]" in text for leaf, dim in free):
                unread.append(text)
            continue
        if not isinstance(condition, Size) or (condition.op is operator.le and condition.args[1] in _CUDNN):
            continue
        used = condition.sizes() & free
        if not used or used != condition.sizes():
            if used:
                joint.append((condition, text))
            continue
        if len(used) == 1:
            single.setdefault(next(iter(used)), []).append((condition, text))
        else:
            joint.append((condition, text))
    guards: list[Guard] = []
    lower: dict[tuple[int, int], int] = {}
    for key, conditions in single.items():
        bound, rest = _condense(key, conditions, values[key[0]].shape[key[1]].node.hint)  # type: ignore[attr-defined]
        lower[key] = bound
        if bound > 1:
            message = f"upscale: input {names[key[0]]!r} must have at least size {bound} in dimension {key[1]}"
            guards.append(Guard(Size(*key) >= bound, message))
        guards.extend(_literal(condition, text, parameter, names) for condition, text in rest)
    guards.extend(
        _literal(condition, text, parameter, names) for condition, text in joint if not _holds_jointly(condition, lower)
    )
    return guards, unread


def _literal(condition: Size, text: str, parameter: str, names: Sequence[str]) -> Guard:
    for leaf, name in enumerate(names):
        text = text.replace(f"L['{parameter}'][{leaf}]", name)
    return Guard(condition, f"upscale: the captured graph is valid only where {text}")


def _condense(
    key: tuple[int, int], conditions: list[tuple[Size, str]], example: int | None
) -> tuple[int, list[tuple[Size, str]]]:
    """The least size from which on conditions hold without exception, and those that fail beyond any such bound or
    whose bound would leave out the ``example``'s own size."""
    probe = torch.cat([torch.arange(1, _PROBES + 1), torch.tensor(_LARGE)])
    bound: int = 1
    rest: list[tuple[Size, str]] = []
    for condition, text in conditions:
        held = torch.as_tensor(condition.value({key: probe})).expand(len(probe))
        failing = torch.nonzero(~held)
        last = int(failing[-1]) + 1 if failing.numel() else 0
        if last > _PROBES // 2 or (example is not None and last >= example):
            rest.append((condition, text))
        else:
            bound = max(bound, last + 1)
    return bound, rest


def _holds_jointly(condition: Size, lower: Mapping[tuple[int, int], int]) -> bool:
    """True where a condition on several sizes holds for every probed combination above the bounds."""
    axes = sorted(condition.sizes())
    if len(axes) > 4:
        return False
    small, large = torch.arange(12), torch.tensor([30, 100, 127, 224, 1000, *_LARGE])
    starts = [lower.get(key, 1) for key in axes]
    grid = torch.meshgrid(*[torch.cat([small + start, large + start]) for start in starts], indexing="ij")
    return bool(torch.as_tensor(condition.value(dict(zip(axes, grid, strict=True)))).all())
