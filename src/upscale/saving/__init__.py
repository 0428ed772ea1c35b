"""Saving pruned models and loading them again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from upscale.accept import unwrap
from upscale.errors import FileError, InputError, MismatchError
from upscale.exporting import attach_report
from upscale.recipe import Recipe, attach_recipe, parse_recipe, recipe_text
from upscale.recipe.codec import Pool, decode, encode
from upscale.recipe.describe import difference, digest_of, module_facts
from upscale.recipe.model import recipe_data, recipe_from
from upscale.saving import archive, store
from upscale.saving.program import reexported
from upscale.saving.rebuild import rebuild
from upscale.saving.state import State, apply_state, named_tensors, state_of

__all__ = ["load", "save", "unchanged"]


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a pruned model, whole or not at all. A file that is there already is replaced.

    Args:
        model: what :func:`upscale.export`, :func:`upscale.prune` or :class:`upscale.PruningManager` made, trained
            further or not, on any device and in any dtype.
        path: ``*.safetensors`` holds the weights and the plan, to be loaded into the original architecture's code and
            trained further; no pickle. ``*.pt2`` holds a program of ``torch.export`` in eval mode, which needs no
            architecture, for inference alone.

    Raises:
        MismatchError: ``model`` is no pruned model, or its layers were changed since it was made.
        InputError: ``path`` ends otherwise. FileError: it cannot be written.
    """
    target = Path(path)
    kind = _kind(target)
    pruned, recipe = unchanged(model)
    kind.save(pruned, recipe, target)


def load(
    path: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    args: Any = None,
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Load a model that :func:`save` wrote.

    Args:
        path: a ``*.safetensors`` or ``*.pt2`` file. Load ``*.pt2`` only where you trust whoever wrote it: torch reads
            such a file as a program.
        model: the original architecture, built anew with any weights. It is captured again and left as it was; the
            result lies on its device. For ``*.safetensors`` only.
        args, kwargs: an example call, where the model takes an object of a class of your own, which a file cannot hold.

    Returns:
        For ``*.safetensors`` the pruned model, as it was saved: weights, dtypes, flags, ``report``. For ``*.pt2`` a
        module that computes the same and cannot be trained.

    Raises:
        FileError: the file is missing, damaged, of another kind or newer. MismatchError: ``model`` is another
        architecture; the message names the first tensor or step that differs.
        InputError: an argument is missing or makes no sense for this kind of file.
    """
    source = Path(path)
    kind = _kind(source)
    if not source.is_file():
        raise FileError(f"there is no file {str(source)!r}")
    return kind.load(source, model, None if args is None and kwargs is None else (() if args is None else args, kwargs))


def unchanged(model: nn.Module) -> tuple[fx.GraphModule, Recipe]:
    """The pruned module and its recipe with the settings of now.

    Raises:
        MismatchError: ``model`` is no pruned model, or no longer what was exported but for its weights.
    """
    pruned = unwrap(model)
    text = recipe_text(pruned)
    if text is None or not isinstance(pruned, fx.GraphModule):
        parts = [name for name, module in pruned.named_modules() if name and recipe_text(module) is not None]
        hint = f"; its part {parts[0]!r} is: save that" if parts else ": save takes what upscale.export returns"
        raise MismatchError(f"{type(pruned).__name__} is no pruned model{hint}")
    recipe = parse_recipe(text)
    modules = module_facts(pruned)
    problem = difference(recipe.modules, modules)
    if problem is None and digest_of(pruned.graph) != recipe.steps[-1].emitted:
        problem = "its graph was edited"
    if problem is not None:
        raise MismatchError(f"the model was changed since it was exported, so its plan no longer holds: {problem}")
    return pruned, replace(recipe, modules=modules)


# -- weights and plan -------------------------------------------------------------------------------------------------


def _save_weights(pruned: fx.GraphModule, recipe: Recipe, path: Path) -> None:
    state, tensors = state_of(pruned)
    _check_tensors(pruned, recipe)
    pool = Pool()
    body = {
        "writer": {"upscale": _version(), "torch": torch.__version__},
        "recipe": recipe_data(recipe),
        "state": {**encode(state, pool), "lists": pool.texts},
    }
    store.write(path, body, tensors)


def _check_tensors(pruned: fx.GraphModule, recipe: Recipe) -> None:
    """The module's tensors must be those that came out of the export, by name and shape."""
    expected = dict(recipe.tensors)
    here = {name: tuple(tensor.shape) for name, tensor in named_tensors(pruned)}
    for name, shape in expected.items():
        if here.get(name) != shape:
            now = f"has shape {here[name]}" if name in here else "is gone"
            raise MismatchError(f"the model was changed since it was exported: {name} of shape {shape} {now}")
    if new := [name for name in here if name not in expected]:
        raise MismatchError(f"the model was changed since it was exported: {new[0]} is new")


def _load_weights(path: Path, model: nn.Module | None, example: Any) -> fx.GraphModule:
    if model is None:
        raise InputError(
            f"{str(path)!r} holds weights and a plan: pass the original architecture too, load(path, model)"
        )
    body, tensors = store.read(path)
    try:
        recipe, state = _parsed(body)
        pruned, plan = rebuild(recipe, model, example)
        device = next((tensor.device for _, tensor in named_tensors(unwrap(model))), torch.device("cpu"))
        apply_state(pruned, state, tensors, recipe.modules, device)
    except (FileError, MismatchError) as error:
        raise type(error)(f"{str(path)!r}: {error}{_other_versions(body)}") from error
    attach_report(pruned, replace(recipe.report, plan=plan))
    attach_recipe(pruned, recipe)
    return pruned


def _parsed(body: Any) -> tuple[Recipe, State]:
    if not isinstance(body, dict) or set(body) != {"writer", "recipe", "state"}:
        raise FileError("its description lacks a part")
    data = body["state"]
    if not isinstance(data, dict) or "lists" not in data:
        raise FileError("it holds no state")
    rest = {key: value for key, value in data.items() if key != "lists"}
    return recipe_from(body["recipe"]), decode(State, rest, Pool(data["lists"]), "state")


def _other_versions(body: Any) -> str:
    """A hint for a failed load: who wrote the file, where that is another version."""
    writer = body.get("writer") if isinstance(body, dict) else None
    here = {"upscale": _version(), "torch": torch.__version__}
    if not isinstance(writer, dict) or writer == here:
        return ""
    there = ", ".join(f"{name} {str(writer.get(name))[:40]}" for name in here)
    return f" (written with {there}; these are {', '.join(f'{name} {version}' for name, version in here.items())})"


def _version() -> str:
    import upscale

    return upscale.__version__


# -- a program --------------------------------------------------------------------------------------------------------


def _save_program(pruned: fx.GraphModule, recipe: Recipe, path: Path) -> None:
    archive.write(path, reexported(pruned, recipe.steps[-1]), recipe.report)


def _load_program(path: Path, model: nn.Module | None, example: Any) -> nn.Module:
    if model is not None or example is not None:
        raise InputError(f"{str(path)!r} holds a whole program: load it by its path alone")
    return archive.read(path)


# -- kinds of files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    save: Any
    load: Any


_KINDS = {".safetensors": _Kind(_save_weights, _load_weights), ".pt2": _Kind(_save_program, _load_program)}


def _kind(path: Path) -> _Kind:
    if path.suffix not in _KINDS:
        raise InputError(f"{str(path)!r} must end in {' or '.join(_KINDS)}")
    return _KINDS[path.suffix]
