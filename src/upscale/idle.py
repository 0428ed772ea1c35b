"""What works in training only: an eval-mode capture does not hold it, so the report has to say so."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx, nn

from upscale.aliases import argument, is_idle_dropout
from upscale.printing import listed
from upscale.program import module_path

_aten = torch.ops.aten

# How operators call the switch between training and evaluation.
_SWITCHES = ("training", "train", "use_input_stats")
_DROPOUTS = (nn.modules.dropout._DropoutNd,)
_NORMS = {
    1: (nn.BatchNorm1d, nn.InstanceNorm1d),
    2: (nn.BatchNorm2d, nn.InstanceNorm2d),
    3: (nn.BatchNorm3d, nn.InstanceNorm3d),
}
_STOCHASTIC = ("StochasticDepth", "DropPath")


def dropped_notes(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], graph: fx.Graph, executed: Collection[str]
) -> list[str]:
    """Notes on what evaluation never runs: layers whose weights are not exported, and randomness that is lost.

    ``executed``: paths of the modules that made a node of the graph, and of all around them.
    """
    unused, training = _unexecuted(model, tensors, executed)
    training += [f"{path or 'model'} (attention dropout)" for path in _attention_dropouts(model, graph, executed)]
    notes = []
    if unused:
        notes.append(f"not used in eval mode, so not exported: {listed(unused)}")
    if training:
        notes.append(f"active in training only, so not exported: {listed(training)}")
    return notes


def _unexecuted(
    model: nn.Module, tensors: Mapping[str, torch.Tensor], executed: Collection[str]
) -> tuple[list[str], list[str]]:
    """Paths of modules with parameters that do not run, and of random layers that run in training only."""
    used = {name.rpartition(".")[0] for name in tensors}
    unused: list[str] = []
    training: list[str] = []
    for path, module in model.named_modules():
        if path in executed or any(owner == path or owner.startswith(f"{path}.") for owner in used):
            continue
        if unused and path.startswith(f"{unused[-1]}."):
            continue
        if any(True for _ in module.parameters()):
            unused.append(path)
        elif any(name in type(module).__name__ for name in _STOCHASTIC):
            training.append(path)
        elif isinstance(module, _DROPOUTS) and module.p > 0:
            training.append(path)
    return unused, training


def _attention_dropouts(model: nn.Module, graph: fx.Graph, executed: Collection[str]) -> list[str]:
    """Paths of attention modules whose dropout rate reached the graph as zero, being in eval mode."""
    modules = dict(model.named_modules(remove_duplicate=False))
    paths = [p for p, m in modules.items() if p in executed and isinstance(m, nn.MultiheadAttention) and m.dropout > 0]
    for node in graph.nodes:
        if _without_rate(node) and (path := module_path(node)) not in paths:
            settings = vars(modules[path]).items() if path in modules else ()
            if any("drop" in name.lower() and isinstance(value, float) and value > 0 for name, value in settings):
                paths.append(path)
    return paths


def _without_rate(node: fx.Node) -> bool:
    """Attention or functional dropout that was called with a rate of zero."""
    if node.target is _aten.scaled_dot_product_attention.default:
        return argument(node, "dropout_p") == 0
    return is_idle_dropout(node) and argument(node, "p") == 0


def switch_notes(
    layers: Mapping[fx.Node, str], calls: Sequence[fx.Node], modules: Mapping[str, nn.Module]
) -> list[str]:
    """Notes on what answers ``train()`` otherwise than the original, or may do so.

    ``layers``: calls that are emitted as layers, with their paths; ``calls``: all others, whose flag is fixed.
    """
    fixed = [f"{module_path(node) or 'model'} ({_kind(node)})" for node in calls if _is_fixed(node)]
    unknown = [
        f"{path} ({type(modules[path]).__name__})"
        for node, path in layers.items()
        if "norm" in _kind(node) and is_frozen_norm(modules.get(path)) is None
    ]
    notes = []
    if fixed:
        what = "keeps to eval mode after train() too, since the call is not a layer's"
        notes.append(f"{what}: {listed(list(dict.fromkeys(fixed)))}")
    if unknown:
        what = "exported as torch's own layer, which uses batch statistics after train() whatever its class did"
        notes.append(f"{what}: {listed(list(dict.fromkeys(unknown)))}")
    return notes


def is_frozen_norm(module: nn.Module | None) -> bool | None:
    """Whether a batch or instance norm of a class of its own keeps to its running statistics in training.

    False for torch's own classes. A copy is tried out; None where that fails.
    """
    if not isinstance(module, nn.modules.batchnorm._NormBase) or module.running_mean is None:
        return False
    if all((getattr(type(module), name).__module__ or "").startswith("torch.nn.") for name in ("forward", "train")):
        return False
    try:
        probe = copy.deepcopy(module)
        mean = probe.running_mean
        assert mean is not None
        space = next(d for d, kinds in _NORMS.items() if isinstance(module, kinds))
        spread = torch.linspace(-2, 3, 4 * 2**space, dtype=mean.dtype, device=mean.device)
        x = mean.clone().view(1, -1, *[1] * space) + spread.view(4, 1, *[2] * space)
        with torch.no_grad():
            return torch.equal(probe.eval()(x), probe.train()(x))
    except Exception:  # a stranger's code may fail in any way
        return None


def _kind(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    return "" if schema is None else schema.name.removeprefix("aten::")


def _is_fixed(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is None or is_idle_dropout(node):  # dropout is emitted as a layer
        return False
    names = {a.name for a in schema.arguments}
    switched_off = any(name in names and argument(node, name) is False for name in _SWITCHES)
    return switched_off and not ("dropout" in names and argument(node, "dropout") == 0)  # a plain LSTM
