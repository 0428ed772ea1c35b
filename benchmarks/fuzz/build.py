"""Builds a network step by step, running every step on small tensors as it is added: no operator needs shape rules.

The steps are run at two batch sizes side by side. What fails, is not finite, is too large or does not scale with the
batch is rejected, so that every network that comes out is valid at any batch size.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import torch.utils.checkpoint
from torch import nn

from .classes import CLASSES
from .graph import Graph, Input, Step

BATCHES = (2, 3)
LARGEST = 10000  # elements of one tensor, per example
NAMESPACE: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "math": math}
exec("".join(CLASSES.values()), NAMESPACE)


class Reject(Exception):
    """The step cannot be done with these tensors."""


@dataclass(frozen=True)
class T:
    """A tensor of the network: its name, its dimensions after the batch, how many rows each example has."""

    name: str
    dims: tuple[int, ...]
    times: int = 1
    floating: bool = True
    vocabulary: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def rank(self) -> int:
        """The number of dimensions, the batch included."""
        return len(self.dims) + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape with -1 for the batch, so that ``shape[1]`` is the channels of an image."""
        return (-1, *self.dims)

    @property
    def size(self) -> int:
        """Elements per row."""
        return math.prod(self.dims)


Predicate = Callable[[T], bool]


def fill(model: nn.Module, seed: int, seen: set[str] | None = None) -> None:
    """Random values for every floating parameter and buffer, each from a seed of its own name; ``seen`` ones stay."""
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or (seen is not None and name in seen):
                continue
            generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
            value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("_mask"):
                value = torch.ones_like(value)
            elif name.endswith("running_var"):
                value = 0.5 + value.abs()
            elif tensor.dim() > 1:
                value = value / max(1, tensor[0].numel()) ** 0.5
            else:
                value = 0.2 + 0.6 * value
            tensor.copy_(value)


def make_inputs(inputs: Sequence[Input], batch: int, seed: int) -> list[torch.Tensor]:
    """Random arguments for ``forward``."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for item in inputs:
        shape = (batch, *item.dims)
        if item.vocabulary:
            made.append(torch.randint(0, item.vocabulary, shape, generator=generator))
        else:
            made.append(torch.randn(shape, generator=generator, dtype=torch.float64))
    return made


class Frame:
    """What an operator of the catalogue sees: its tensors, its random choices, and a place to write code to."""

    def __init__(self, builder: Builder, step: Step, rng: random.Random | None) -> None:
        self.builder, self.step, self.rng = builder, step, rng
        self.refs: dict[str, str] = {}
        self.choices: dict[str, Any] = {}
        self.init: list[str] = []
        self.body: list[str] = []
        self.heads: list[list[tuple[str, int, tuple[int, ...]]]] = []
        self.writes: list[str] = []
        self.taken: list[str] = []  # variables this step has assigned already

    # -- choosing ---------------------------------------------------------------------------------------------------

    def need(self, condition: bool) -> None:
        """Reject the step unless ``condition`` holds."""
        if not condition:
            raise Reject

    def take(self, key: str = "x", accept: Predicate | None = None, floating: bool = True) -> T:
        """An earlier tensor, recent and unused ones first."""
        pool = self.builder.pool

        def fits(t: T) -> bool:
            return t.floating == floating and (accept is None or accept(t))

        if self.rng is None:
            found = pool.get(self.step.refs.get(key, ""))
            if found is None or not fits(found):
                raise Reject
        else:
            able = [t for t in pool.values() if fits(t)]
            self.need(bool(able))
            weights = [(3.0 if t.name not in self.builder.used else 1.0) * (1 + index) for index, t in enumerate(able)]
            found = self.rng.choices(able, weights)[0]
        self.refs[key] = found.name
        return found

    def pick(self, key: str, options: Sequence[Any]) -> Any:
        """One of the options. The first is the simplest: it stands in where the choice is not recorded or not open."""
        self.need(len(options) > 0)
        if self.rng is not None:
            value = self.rng.choice(options)
        else:
            value = self.step.choices.get(key, options[0])
            if value not in options:
                value = options[0]
        if value != options[0]:
            self.choices[key] = value
        return value

    def flag(self, key: str) -> bool:
        """False, the simpler, or True."""
        return bool(self.pick(key, (False, True)))

    def width(self, key: str = "out", multiple: int = 1, low: int = 2) -> int:
        """A number of channels."""
        widths = [w * multiple for w in (2, 3, 4, 5, 6, 8) if w * multiple <= 12 and w * multiple >= low]
        return int(self.pick(key, widths or [multiple]))

    def pick_shared(self, kinds: tuple[str, ...] = ("",)) -> tuple[str, int, tuple[int, ...]]:
        """A submodule of an earlier step: its name, the step, the dimensions it was applied to."""
        able = {}
        for name, number, dims in self.builder.modules:
            module = getattr(self.builder.root, name)
            stale = hasattr(module, "weight_v") or hasattr(module, "weight_mask")  # set by a hook when it runs
            kind = type(module).__name__
            if any(k in kind for k in kinds) and not (stale and kinds != ("",)):
                able[name] = (name, number, dims)
        self.need(bool(able))
        name = self.rng.choice(list(able)) if self.rng is not None else self.step.choices.get("shared")
        self.need(name in able)
        self.choices["shared"] = name
        return able[name]

    def kind_of(self, name: str) -> str:
        """The class of a submodule."""
        return type(getattr(self.builder.root, name)).__name__.removeprefix("Parametrized")

    def weight_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a submodule's weight."""
        weight = getattr(getattr(self.builder.root, name), "weight", None)
        self.need(isinstance(weight, torch.Tensor))
        return tuple(weight.shape)

    # -- code -------------------------------------------------------------------------------------------------------

    def _name(self, letter: str) -> str:
        taken = sum(line.split(" ")[0].startswith(f"self.{letter}{self.step.number}") for line in self.init)
        return f"{letter}{self.step.number}" + ("" if not taken else "bcdefghijklmn"[taken - 1])

    def module(self, code: str) -> str:
        """A submodule: ``self.m3``."""
        name = self._name("m")
        self.init.append(f"self.{name} = {code}")
        return f"self.{name}"

    def param(self, *shape: int) -> str:
        """A free parameter: ``self.p3``."""
        name = self._name("p")
        self.init.append(f"self.{name} = nn.Parameter(torch.zeros({', '.join(map(str, shape)) or '()'}))")
        return f"self.{name}"

    def buffer(self, code: str) -> str:
        """A buffer: ``self.b3``."""
        name = self._name("b")
        self.init.append(f'self.register_buffer("{name}", {code})')
        return f"self.{name}"

    def setup(self, code: str) -> None:
        """One more line of ``__init__``."""
        self.init.append(code)

    def line(self, code: str) -> None:
        """One more line of ``forward``."""
        self.body.append(code)

    def let(self, code: str) -> str:
        """Assign to a fresh variable."""
        name = f"t{self.step.number}" + ("_" + str(len(self.taken)) if self.taken else "")
        self.taken.append(name)
        self.line(f"{name} = {code}")
        return name

    def unpack(self, code: str, count: int) -> list[str]:
        """Assign the parts of a list or tuple to the step's own variables."""
        names = [f"v{self.step.number}{'abcdefghijkl'[i]}" for i in range(count)]
        self.line(", ".join(names) + f"{',' if count == 1 else ''} = {code}")
        return names

    def writing(self, x: T) -> None:
        """Declare that the step writes into ``x``: refused where that is an argument of the model or a weight."""
        self.writes.append(x.name)

    def head(self, *zeros: tuple[str, int, Sequence[int]]) -> None:
        """Declare the weights of one attention head, as (parameter, dimension, indices): masks remove whole heads."""
        self.heads.append([(name.removeprefix("self."), dim, tuple(index)) for name, dim, index in zeros])


class Builder:
    """The network so far: code, live tensors, the module itself."""

    def __init__(self, inputs: Sequence[Input], seed: int) -> None:
        self.seed = seed
        self.root = nn.Module()
        self.init: list[str] = []
        self.body: list[str] = []
        self.pool: dict[str, T] = {}
        self.used: set[str] = set()
        self.heads: list[list[tuple[str, int, tuple[int, ...]]]] = []
        self.modules: list[tuple[str, int, tuple[int, ...]]] = []  # attribute, step, dims it was applied to
        self.dirty = False  # a rejected step has overwritten values: build anew before going on
        self._seen: set[str] = set()
        self._envs: list[dict[str, Any]] = []
        for batch in BATCHES:
            tensors = make_inputs(inputs, batch, seed + batch)
            named = {item.name: tensor for item, tensor in zip(inputs, tensors, strict=True)}
            self._envs.append({**NAMESPACE, "self": self.root, **named})
        self.inputs = [item.name for item in inputs]
        for item in inputs:
            self.pool[item.name] = T(item.name, item.dims, 1, not item.vocabulary, item.vocabulary)

    def add(self, step: Step, operator: Callable[[Frame], Any], rng: random.Random | None = None) -> Step:
        """Run one step (drawing its choices where ``rng`` is given) and take its results into the pool.

        Raises Reject, and leaves no trace but for values overwritten by an in-place step.
        """
        frame = Frame(self, step, rng)
        result = operator(frame)
        names = self._assign(frame, result)
        children = set(self.root._modules) | set(self.root._parameters) | set(self.root._buffers)
        envs = [dict(env) for env in self._envs]
        try:
            made = self._run(frame, names, envs)
        except Exception as error:
            self.dirty = self.dirty or bool(frame.writes)
            for name in {*self.root._modules, *self.root._parameters, *self.root._buffers} - children:
                delattr(self.root, name)
            if isinstance(error, Reject):
                raise
            raise Reject(f"{type(error).__name__}: {error}") from error
        self._seen = {name for name, _ in [*self.root.named_parameters(), *self.root.named_buffers()]}
        self._envs = envs
        new = set(self.root._modules) - children
        dims = self.pool[frame.refs["x"]].dims if "x" in frame.refs else ()
        self.modules += [(name, step.number, dims) for name in self.root._modules if name in new]
        self.init += frame.init
        self.body += frame.body
        self.heads += frame.heads
        self.used.update(frame.refs.values())
        self.pool.update({t.name: t for t in made})
        return Step(step.number, step.op, frame.refs, frame.choices)

    def _assign(self, frame: Frame, result: Any) -> list[str]:
        """Give the results of an operator their names; those that are variables of the step already keep theirs."""
        if isinstance(result, str):
            name = f"v{frame.step.number}"
            frame.line(f"{name} = {result}")
            return [name]
        return list(result)

    def _run(self, frame: Frame, names: list[str], envs: list[dict[str, Any]]) -> list[T]:
        with torch.no_grad():
            exec("\n".join(frame.init), {**NAMESPACE, "self": self.root})
            self.root.double().eval()
            fill(self.root, self.seed, self._seen)
            self._check_writes(frame)
            for env in envs:
                exec("\n".join(frame.body), env)
        return [_tensor(name, [env[name] for env in envs]) for name in names]

    def _check_writes(self, frame: Frame) -> None:
        """A write must reach neither the caller's tensors nor a weight, and each element once (no expanded views)."""
        for name in frame.writes:
            env = self._envs[0]
            target = env[name].untyped_storage().data_ptr()
            fixed = [env[i] for i in self.inputs] + [*self.root.parameters(), *self.root.buffers()]
            if any(tensor.untyped_storage().data_ptr() == target for tensor in fixed):
                raise Reject
            if any(s == 0 and n > 1 for s, n in zip(env[name].stride(), env[name].shape, strict=True)):
                raise Reject


def _tensor(name: str, values: list[Any]) -> T:
    """Describe a result by what it is at the two batch sizes; Reject what is no good."""
    first, second = values
    good = isinstance(first, torch.Tensor) and 2 <= first.dim() <= 6 and first.shape[1:] == second.shape[1:]
    if not good or not first.numel() or first.shape[0] * BATCHES[1] != second.shape[0] * BATCHES[0]:
        raise Reject
    if first.shape[0] % BATCHES[0] or first.numel() > LARGEST * BATCHES[0] or first.dtype == torch.bool:
        raise Reject
    if first.is_floating_point():
        if first.dtype != torch.float64 or not bool(torch.isfinite(first).all()) or first.abs().max() > 300:
            raise Reject
        if first.abs().max() < 1e-6:
            raise Reject
    elif first.is_complex():
        raise Reject
    return T(name, tuple(first.shape[1:]), first.shape[0] // BATCHES[0], first.is_floating_point())


def rebuild(graph: Graph, catalogue: dict[str, Any]) -> tuple[Builder, Graph]:
    """Build a graph from its data; also the graph with only the choices that were used. Raises Reject."""
    builder = Builder(graph.inputs, graph.seed)
    steps = []
    for step in graph.steps:
        steps.append(builder.add(step, catalogue[step.op].function))
    if any(name not in builder.pool for name in graph.outputs) or not graph.outputs:
        raise Reject
    return builder, graph.with_steps(steps)
