"""Ways to organise modules: containers, subclasses, hooks, contexts, layers that borrow or share parameters."""

from __future__ import annotations

from .build import Frame
from .catalogue import op, plane


@op("containers", 1.5)
def container(b: Frame) -> str:
    """Layers in a Sequential, a ModuleList or a ModuleDict, called whole, in part or in another order."""
    x = b.take(accept=plane)
    c, out = x.dims[0], b.width()
    layers = (
        f"nn.Conv2d({c}, {out}, 1), nn.BatchNorm2d({out}), nn.ReLU(inplace=True), nn.Conv2d({out}, {out}, 3, padding=1)"
    )
    form = b.pick("f", ("sequential", "part", "list", "dict", "nested", "named"))
    if form == "dict":
        held = b.module(f'nn.ModuleDict({{"conv": nn.Conv2d({c}, {out}, 1), "norm": nn.BatchNorm2d({out})}})')
        return f'{held}["norm"]({held}["conv"]({x}))'
    if form == "nested":
        held = b.module(f"nn.Sequential(nn.Sequential({layers}), nn.Sequential(nn.BatchNorm2d({out})))")
        return f"{held}[1]({held}[0]({x}))" if b.flag("apart") else f"{held}({x})"
    held = b.module(
        f"nn.{'ModuleList([' if form == 'list' else 'Sequential('}{layers}{'])' if form == 'list' else ')'}"
    )
    if form == "part":
        return f"{held}[:2]({x})"
    if form == "list":
        return f"{held}[3]({held}[1]({held}[0]({x}))) + {held}[3]({held}[0]({x}))"
    return f"{held}({x})"


@op("subclasses", 2)
def subclass(b: Frame) -> str:
    """A subclass of a layer whose forward does more, or does something else."""
    x = b.take(accept=lambda t: 2 <= t.rank <= 4)
    linear = ("HalfLinear", "EqualLinear", "BareLinear", "Gain")
    kinds = (*linear, "StdConv2d", "SameConv2d", "MaskedConv2d", "LayerNorm2d", "ActNorm2d") if plane(x) else linear
    kind = b.pick("kind", kinds)
    if kind == "Gain":
        return f"{b.module(f'Gain({x.dims[-1]})')}({x}{b.pick('residual', ('', ', residual=False'))})"
    if kind in linear:
        return f"{b.module(f'{kind}({x.dims[-1]}, {b.width()})')}({x})"
    if "Norm" in kind:
        return f"{b.module(f'{kind}({x.dims[0]})')}({x})"
    kernel = b.pick("kernel", (1, 2))
    return f"{b.module(f'{kind}({x.dims[0]}, {b.width()}, {kernel})')}({x})"


@op("hooks")
def hooked(b: Frame) -> str:
    """A layer with a hook that changes its input or its output."""
    x = b.take(accept=lambda t: 2 <= t.rank <= 4)
    layer = b.module(f"nn.Linear({x.dims[-1]}, {b.width()})")
    if b.flag("pre"):
        b.setup(f"{layer}.register_forward_pre_hook(lambda module, args: (args[0] * 0.5 + 0.1,))")
    else:
        b.setup(f"{layer}.register_forward_hook(lambda module, args, output: F.relu(output) + 0.1)")
    return f"{layer}({x})"


@op("contexts")
def context(b: Frame) -> str:
    """Part of the computation in a context, in a checkpoint, in a local function."""
    x = b.take(accept=lambda t: 2 <= t.rank <= 4)
    layer = b.module(f"nn.Linear({x.dims[-1]}, {b.width()})")
    form = b.pick("f", ("no_grad", "autocast", "checkpoint", "detach", "local"))
    name = f"v{b.step.number}"
    if form == "checkpoint":
        return f"torch.utils.checkpoint.checkpoint({layer}, {x}, use_reentrant=False)"
    if form == "detach":
        return f"{layer}({x}.detach()) - {layer}({x}).detach() * 0.5"
    if form == "local":
        b.line(f"def again{b.step.number}(y, times=2):\n    return {layer}(y) * times")
        return f"again{b.step.number}({x}) + again{b.step.number}({x} * 0.5, times=1)"
    with_ = "torch.no_grad()" if form == "no_grad" else 'torch.autocast("cpu", enabled=False)'
    b.line(f"with {with_}:\n    {name} = F.relu({layer}({x}))")
    return [name]  # type: ignore[return-value]


@op("shared and tied", 1.5)
def tied_module(b: Frame) -> str:
    """A second layer whose weight is the first's own parameter; both have biases of their own."""
    name, _, _ = b.pick_shared(("Linear", "Conv", "Embedding"))
    shape = b.weight_shape(name)
    kind = b.kind_of(name)
    if len(shape) == 2:
        x = b.take("x", lambda t: 2 <= t.rank <= 4 and t.dims[-1] == shape[1])
        layer = b.module(f"nn.Linear({shape[1]}, {shape[0]})")
    else:
        b.need(kind == f"Conv{len(shape) - 2}d")
        x = b.take("x", lambda t: t.rank == len(shape) and t.dims[0] == shape[1])
        kernel = tuple(shape[2:])
        layer = b.module(
            f"nn.Conv{len(shape) - 2}d({shape[1]}, {shape[0]}, {kernel}, padding={b.pick('padding', (0, 1))})"
        )
    b.setup(f"{layer}.weight = self.{name}.weight")
    return f"{layer}({x})"


@op("shared and tied", 1.5)
def borrowed(b: Frame) -> str:
    """A functional call with parameters of layers: other options than the layer's, no bias, another layer's bias."""
    name, _, dims = b.pick_shared(("Linear", "Conv", "BatchNorm", "LayerNorm"))
    kind, shape = b.kind_of(name), b.weight_shape(name)
    weight, bias = f"self.{name}.weight", f"self.{name}.bias"
    if kind == "Linear":
        x = b.take("x", lambda t: 2 <= t.rank <= 4 and t.dims[-1] == shape[1])
        return f"F.linear({x}, {weight}, {b.pick('bias', (bias, 'None', b.param(shape[0])))})"
    if kind == "LayerNorm":
        x = b.take("x", lambda t: len(shape) == 1 and t.dims[-1] == shape[0])
        options = b.pick("options", (f"{weight}, {bias}, 1e-2", f"{weight}", f"None, {bias}"))
        return f"F.layer_norm({x}, ({shape[0]},), {options})"
    if "BatchNorm" in kind:
        x = b.take("x", lambda t: t.dims[0] == shape[0])
        options = b.pick("options", (f"{weight}, {bias}, False, 0.1, 1e-2", f"{weight}", f"None, {bias}"))
        return f"F.batch_norm({x}, self.{name}.running_mean, self.{name}.running_var, {options})"
    b.need(kind.startswith("Conv") and "Transpose" not in kind)
    nd = len(shape) - 2
    x = b.take("x", lambda t: t.rank == nd + 2 and t.dims[0] == shape[1])
    options = b.pick("options", (f"{bias}, 1, 1", "None", f"{bias}, 2", f"{b.param(shape[0])}, 1, 2"))
    return f"F.conv{nd}d({x}, {weight}, {options})"
