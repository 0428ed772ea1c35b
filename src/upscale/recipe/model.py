"""The recipe of a pruned model: all that is needed to make it again from the original architecture's code.

Plain data that travels with the module as one text, so that it survives copies and pickles without this library.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from upscale.errors import FileError
from upscale.plan import Plan
from upscale.program import Program
from upscale.recipe.codec import Pool, decode, encode
from upscale.recipe.describe import (
    ModuleFact,
    TensorFact,
    canonical_names,
    difference,
    digest_of,
    graph_lines,
    module_facts,
    tensor_facts,
)
from upscale.recipe.example import Call, Sizes, call_of, sizes_of
from upscale.report import Report

__all__ = ["Recipe", "Step", "attach_recipe", "make_recipe", "parse_recipe", "recipe_text", "renamed"]

ATTRIBUTE = "_upscale_recipe"
_JOINED = "*"  # in a plan: what several tensors joined give, no node of its own


@dataclass(frozen=True)
class Step:
    """One export. ``plan``: with canonical names of nodes. ``lines``: the captured graph and its guards, in words.
    ``emitted``: digest of the graph that came out."""

    call: Call
    sizes: Sizes
    tensors: tuple[TensorFact, ...]
    lines: tuple[str, ...]
    plan: Plan
    emitted: str


@dataclass(frozen=True)
class Recipe:
    """The exports that made a module, the first of the original model, each later one of the result before it; and
    what came out. ``name``: of the emitted class."""

    name: str
    steps: tuple[Step, ...]
    modules: tuple[ModuleFact, ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]  # every parameter and buffer that came out, and its shape
    report: Report


def make_recipe(program: Program, plan: Plan, pruned: fx.GraphModule, report: Report) -> Recipe:
    """The recipe of ``pruned``, which ``plan`` made of the captured ``program``."""
    step = Step(
        call=call_of(program),
        sizes=sizes_of(program),
        tensors=tensor_facts(program),
        lines=captured_lines(program),
        plan=renamed(plan, canonical_names(program.graph)),
        emitted=digest_of(pruned.graph),
    )
    named = [*pruned.named_parameters(remove_duplicate=False), *pruned.named_buffers(remove_duplicate=False)]
    shapes = tuple((name, tuple(tensor.shape)) for name, tensor in named)
    return Recipe(type(pruned).__name__, (*_steps_before(program), step), module_facts(pruned), shapes, report)


def _steps_before(program: Program) -> tuple[Step, ...]:
    """The exports that made the model which was captured, where it is still what they made but for its weights."""
    model = program.modules.get("")
    text = None if model is None else recipe_text(model)
    if text is None or not isinstance(model, fx.GraphModule):
        return ()
    before = parse_recipe(text)
    same = digest_of(model.graph) == before.steps[-1].emitted
    same = same and difference(before.modules, module_facts(model)) is None
    return before.steps if same else ()


def captured_lines(program: Program) -> tuple[str, ...]:
    """The captured graph in words, and the conditions on its input sizes."""
    guards = (f"guard {guard.message}" for guard in program.signature.guards)
    return (*graph_lines(program.graph), *guards)


def renamed(plan: Plan, names: dict[str, str]) -> Plan:
    """The plan for a graph whose nodes are called otherwise.

    Raises:
        FileError: the plan is about a node that has no name here.
    """

    def name(node: str) -> str:
        if node == _JOINED:
            return node
        if node not in names:
            raise FileError(f"its plan is about {node[:60]!r}, which its graph does not have")
        return names[node]

    def nested(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {name(r): {name(o): v for o, v in by.items()} for r, by in table.items()}

    reads = {
        r: {
            o: replace(
                read,
                reader=name(read.reader),
                operand=name(read.operand),
                pieces=tuple(replace(p, source=None if p.source is None else name(p.source)) for p in read.pieces),
            )
            for o, read in by.items()
        }
        for r, by in plan.reads.items()
    }
    contractions = {
        name(node): replace(cut, absorber=None if cut.absorber is None else name(cut.absorber))
        for node, cut in plan.contractions.items()
    }
    return replace(
        plan,
        layouts={name(node): layout for node, layout in plan.layouts.items()},
        reads=nested(reads),
        contractions=contractions,
        constants=nested(plan.constants),
        partial=nested(plan.partial),
        tables=tuple(map(name, plan.tables)),
        virtual=tuple(map(name, plan.virtual)),
        dead=tuple(map(name, plan.dead)),
        choices=tuple(replace(choice, layer=name(choice.layer)) for choice in plan.choices),
    )


# -- as text ----------------------------------------------------------------------------------------------------------


def recipe_data(recipe: Recipe) -> dict[str, Any]:
    """JSON-ready; ``lists`` is the pool of channel lists."""
    pool = Pool()
    data = encode(recipe, pool)
    return {**data, "lists": pool.texts}


def recipe_from(data: Any) -> Recipe:
    """Inverse of :func:`recipe_data`.

    Raises:
        FileError: the data is no recipe.
    """
    if not isinstance(data, dict) or "lists" not in data:
        raise FileError("it holds no recipe")
    rest = {key: value for key, value in data.items() if key != "lists"}
    recipe: Recipe = decode(Recipe, rest, Pool(data["lists"]), "recipe")
    if not recipe.steps:
        raise FileError("its recipe has no step")
    return recipe


def parse_recipe(text: str) -> Recipe:
    """A recipe from the text that travels with a module."""
    return recipe_from(json.loads(text))


def attach_recipe(pruned: fx.GraphModule, recipe: Recipe) -> None:
    """Give the module its recipe so that it survives ``copy.deepcopy`` and ``pickle``."""
    text = json.dumps(recipe_data(recipe), separators=(",", ":"))
    object.__setattr__(pruned, ATTRIBUTE, text)
    pruned.meta.setdefault("_user_preserved_attributes", {})[ATTRIBUTE] = text


def recipe_text(model: nn.Module) -> str | None:
    """The text of the recipe that a pruned module carries."""
    text = vars(model).get(ATTRIBUTE)
    return text if isinstance(text, str) else None
