"""The module tree of an emitted model: the original's containers around new layers, every tensor under its own name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from upscale.aliases import storage_id
from upscale.layers import clone_plain, is_plain
from upscale.program import Program, module_path

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
#: Tensors that a layer computes with as soon as it has them.
_COMPUTED_WITH = ("weight", "bias", "running_mean", "running_var")
#: Child that holds what a root module cannot: GraphModule loses the mark "not persistent" of its own buffers.
ROOT_CONSTANTS = "constants"


def executed_paths(program: Program) -> set[str]:
    """Paths of modules that made a node of the graph, and of all modules around them."""
    paths = {""}
    for path in {module_path(node) for node in program.graph.nodes}:
        parts = path.split(".") if path else []
        paths.update(".".join(parts[: end + 1]) for end in range(len(parts)))
    return paths


class Tensors:
    """The emitted model's own tensors: one object for each name of the program, never the user's storage."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._made: dict[str, torch.Tensor] = {}
        modules = program.modules.get("")
        owned = [] if modules is None else [*modules.parameters(), *modules.buffers()]
        self._foreign = {storage_id(tensor) for tensor in owned}

    def get(self, name: str) -> torch.Tensor:
        """The emitted tensor for ``name``: a Parameter for parameters."""
        if name not in self._made:
            spare = name not in self._program.tensors
            tensor = self._program.spare[name] if spare else self._program.tensors[name]
            value = tensor.detach()
            constant = self._program.kinds.get(name) == "constant"
            if constant or storage_id(tensor) in self._foreign:
                value = value.clone()
            if isinstance(tensor, nn.Parameter):
                value = nn.Parameter(value, requires_grad=tensor.requires_grad)
            self._made[name] = value
        return self._made[name]


def _second(module: nn.Module) -> nn.Module:
    """Another object with the very same tensors and children."""
    second = type(module).__new__(type(module))
    second.__dict__ = {k: v.copy() if isinstance(v, (dict, set)) else v for k, v in module.__dict__.items()}
    return second


def _is_bare(module: nn.Module) -> bool:
    """An empty or parameterless container of torch's own: kept, as in the original."""
    if type(module) not in _CONTAINERS or any(True for _ in (*module.parameters(), *module.buffers())):
        return False
    return all(is_plain(child) or _is_bare(child) for child in module.children())


class Names:
    """All names under which the original model knows each tensor, and the first path of each module object."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        first: dict[int, str] = {}
        self.path: dict[str, str] = {}
        for path, module in modules.items():
            self.path[path] = first.setdefault(id(module), path)
        self.aliases: dict[str, list[str]] = {}
        self.persistent: dict[str, bool] = {}
        root = modules.get("")
        if root is None:
            return
        canonical: dict[int, str] = {}
        pairs = [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]
        for name, tensor in pairs:
            chosen = canonical.setdefault(id(tensor), name)
            self.aliases.setdefault(chosen, []).append(name)
            owner, _, leaf = name.rpartition(".")
            self.persistent[name] = leaf not in modules[owner]._non_persistent_buffers_set

    def of(self, name: str) -> list[str]:
        """``name`` and its aliases."""
        return self.aliases.get(name, [name])


class Tree:
    """Builds the emitted root module from layers by path."""

    def __init__(
        self,
        program: Program,
        names: Names,
        tensors: Tensors,
        layers: Mapping[str, nn.Module],
        plain: Mapping[str, nn.Module],
    ) -> None:
        self.program, self.names, self.tensors = program, names, tensors
        self.layers, self.plain = layers, plain
        self.executed = {names.path.get(path, path) for path in executed_paths(program)} | executed_paths(program)
        self.owners = self._owners([*program.tensors, *layers])
        self.emitted: dict[str, str] = {}  # name in the program -> name in the emitted model
        self._memo: dict[int, nn.Module | None] = {}
        self._constants: tuple[str, nn.Module] | None = None
        self.root = nn.Module()

    def _owners(self, names: Iterable[str]) -> set[str]:
        """Paths with something of the program in or below them."""
        owners = {""}
        for name in names:
            for alias in self.names.of(name):
                parts = alias.split(".")
                owners.update(".".join(parts[:end]) for end in range(1, len(parts) + (name in self.layers)))
        return owners

    def build(self) -> nn.Module:
        """The finished tree (a plain root module to take children, parameters and buffers from)."""
        original = self.program.modules.get("")
        if original is not None:
            for name, child in original._modules.items():
                built = None if child is None else self._build(child, name)
                if built is not None:
                    # GraphModule copies each child object once: a second name gets an object of its own, same tensors.
                    again = any(built is other for other in self.root._modules.values())
                    self.root.add_module(name, _second(built) if again else built)
        for name in [*self.program.tensors, *self.program.spare]:
            self._place(name)
        return self.root

    def _build(self, module: nn.Module, path: str) -> nn.Module | None:
        """What stands at ``path`` in the emitted model; None where nothing of it is left."""
        if id(module) not in self._memo:
            self._memo[id(module)] = self._make(module, self.names.path.get(path, path))
        return self._memo[id(module)]

    def _make(self, module: nn.Module, path: str) -> nn.Module | None:
        if path in self.layers:
            self._add_children(self.layers[path], module, path)  # a norm that holds its activation, for instance
            return self.layers[path]
        if path in self.plain:
            return self.plain[path]
        if is_plain(module):
            return clone_plain(module)
        if path not in self.executed and path not in self.owners and not _is_bare(module):
            return None
        kind = next((kind for kind in _CONTAINERS if isinstance(module, kind)), nn.Module)
        made = kind()
        made.training = False
        self._add_children(made, module, path)
        return made

    def _add_children(self, made: nn.Module, module: nn.Module, path: str) -> None:
        for name, child in module._modules.items():
            built = None if child is None else self._build(child, f"{path}.{name}")
            if built is None and type(made) in (nn.Sequential, nn.ModuleList):
                built = nn.Identity().eval()  # keeps the numbering
            if built is not None:
                made.add_module(name, built)

    def at(self, path: str) -> nn.Module | None:
        """The emitted module at ``path``."""
        module: nn.Module | None = self.root
        for part in path.split(".") if path else []:
            module = None if module is None else module._modules.get(part)
        return module

    def _place(self, name: str) -> None:
        """Register a tensor under all its names that still have an owner."""
        spare = name not in self.program.tensors
        kind = "spare" if spare else self.program.kinds[name]
        persistent = kind != "constant" and self.names.persistent.get(name, True)
        for alias in self.names.of(name):
            path, _, leaf = alias.rpartition(".")
            owner = self.at(path)
            if owner is None:
                continue
            if spare and path not in self.executed and path not in self.owners:
                continue
            if spare and path in self.layers and leaf in _COMPUTED_WITH:
                continue  # a bias that the call, written as a function, leaves out: in the layer it would be added
            if leaf in owner._parameters or leaf in owner._buffers:
                self._fill(owner, leaf, name, persistent)
                self.emitted.setdefault(name, alias)
            elif path or persistent:
                self._register(owner, leaf, self.tensors.get(name), persistent)
                self.emitted.setdefault(name, alias)
        if name not in self.emitted and not spare:
            self.emitted[name] = self._place_elsewhere(name, persistent)

    def _fill(self, owner: nn.Module, leaf: str, name: str, persistent: bool) -> None:
        """A slot of a layer that is still empty (``num_batches_tracked``)."""
        for registry in (owner._parameters, owner._buffers):
            if registry.get(leaf, self) is None:
                registry[leaf] = self.tensors.get(name)  # type: ignore[assignment]
        if leaf in owner._buffers and not persistent:
            owner._non_persistent_buffers_set.add(leaf)

    @staticmethod
    def _register(owner: nn.Module, leaf: str, tensor: torch.Tensor, persistent: bool) -> None:
        if isinstance(tensor, nn.Parameter):
            owner.register_parameter(leaf, tensor)
        else:
            owner.register_buffer(leaf, tensor, persistent=persistent)

    def _root_constants(self) -> tuple[str, nn.Module]:
        """Name and module of the child that stands in for the root."""
        if self._constants is None:
            name = ROOT_CONSTANTS
            while hasattr(self.root, name):
                name += "_"
            self._constants = name, nn.Module().eval()
            self.root.add_module(*self._constants)
        return self._constants

    def _place_elsewhere(self, name: str, persistent: bool) -> str:
        """A tensor whose owner is gone, or a buffer of the root that is not persistent."""
        path, _, leaf = name.rpartition(".")
        while path and self.at(path) is None:
            path = path.rpartition(".")[0]
        owner = self.at(path)
        assert owner is not None
        if not path and not persistent:
            path, owner = self._root_constants()
        leaf = leaf or "tensor"
        while hasattr(owner, leaf):
            leaf += "_"
        self._register(owner, leaf, self.tensors.get(name), persistent)
        return f"{path}.{leaf}" if path else leaf
