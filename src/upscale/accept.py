"""Which models can be captured and emitted at all, decided before any work is done."""

from __future__ import annotations

import keyword
from typing import Any

import torch
from torch import fx, nn

from upscale.errors import UnsupportedModelError


def unwrap(model: Any) -> nn.Module:
    """The user's own module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` wrappers.

    Raises UnsupportedModelError for what is no eager module of its own: ScriptModules, sharded models.
    """
    while True:
        if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            break
    if isinstance(model, torch.jit.ScriptModule):
        raise UnsupportedModelError("a ScriptModule cannot be exported: pass the eager module it was made of")
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(f"the model must be an nn.Module, not {type(model).__name__}")
    for path, module in model.named_modules():
        if any(kind.__name__.startswith("FullyShardedDataParallel") for kind in type(module).__mro__) or any(
            kind.__name__ == "FSDPModule" for kind in type(module).__mro__
        ):
            raise UnsupportedModelError(f"{path or 'the model'} is sharded (FSDP): gather it into one module first")
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(f"{path} is a ScriptModule: replace it by the eager module it was made of")
    return model


def check_names(model: nn.Module) -> None:
    """Raise UnsupportedModelError where a child or tensor has a name that generated code cannot spell."""
    reserved = set(dir(fx.GraphModule)) | set(fx.GraphModule(nn.Module(), fx.Graph()).__dict__)
    for path, module in model.named_modules():
        for name in (*module._modules, *module._parameters, *module._buffers):
            full = f"{path}.{name}" if path else name
            if keyword.iskeyword(name) or any(mark in name for mark in "\"'\\\n"):
                raise UnsupportedModelError(
                    f"{full!r} cannot be exported: {name!r} is no name that Python code can spell; rename it"
                )
            if not path and name in reserved:
                raise UnsupportedModelError(
                    f"{name!r} cannot be exported: torch.fx.GraphModule has an attribute of that name; rename it"
                )
