"""Activations, arithmetic with broadcasting, gates and normalisations."""

from __future__ import annotations

from .build import Frame, T
from .catalogue import divisors, image, op, plane, sequence

KEEP_ZERO = (
    "F.relu({x})",
    "F.gelu({x})",
    'F.gelu({x}, approximate="tanh")',
    "F.silu({x})",
    "F.leaky_relu({x}, 0.1)",
    "F.relu6({x})",
    "F.hardswish({x})",
    "F.elu({x})",
    "F.selu({x})",
    "F.celu({x}, 0.5)",
    "F.mish({x})",
    "torch.tanh({x})",
    "F.hardtanh({x}, -0.5, 0.8)",
    "F.softshrink({x}, 0.1)",
    "F.hardshrink({x}, 0.1)",
    "F.tanhshrink({x})",
    "F.softsign({x})",
    "torch.sin({x})",
    "{x}.abs()",
    "{x}.pow(2)",
    "{x} * {x}",
    "-{x}",
    "{x} * torch.sigmoid({x})",
    "torch.expm1({x}.clamp(max=1.0))",
    "torch.log1p({x}.abs())",
    "torch.atan({x})",
    "torch.erf({x})",
    "torch.sqrt({x}.abs() + 1e-6) - 1e-3",
    "torch.nan_to_num({x})",
    "{x}.clamp(-0.7, 0.9)",
    "F.glu(torch.cat([{x}, {x}], 1), 1)",
    "torch.sign({x}) * {x}",
    "torch.maximum({x}, 0.3 * {x})",
    "torch.where({x} > 0.05, {x}, 0.2 * {x})",
    "{x}.float().to({x}.dtype)",
    "({x} * 2).div(3)",
    "F.dropout({x}, 0.3, self.training)",
    "torch.asinh({x})",
)
SHIFT_ZERO = (
    "torch.sigmoid({x})",
    "torch.exp({x}.clamp(max=1.5))",
    "F.softplus({x})",
    "F.hardsigmoid({x})",
    "F.logsigmoid({x})",
    "torch.cos({x})",
    "{x} + 1",
    "1 - {x}",
    "{x}.clamp(min=0.3)",
    "F.threshold({x}, 0.1, 0.7)",
    "torch.rsqrt({x} * {x} + 0.5)",
    "1 / (1 + {x}.abs())",
    "2.0 ** {x}.clamp(max=3)",
    "{x}.add(0.5).mul(0.3)",
    "torch.where({x} > 0.05, {x}, 0.1 * {x} - 0.2)",
    "torch.reciprocal(1.5 + torch.tanh({x}))",
    "torch.logaddexp({x}, -{x})",
    "{x}.masked_fill({x} < -0.03, 0.4)",
    "torch.sub(0.3, {x}, alpha=2)",
    "torch.cosh({x}.clamp(-2, 2))",
    "torch.heaviside({x} - 0.071, torch.ones((), dtype={x}.dtype))",
    "({x} > 0.013).to({x}.dtype)",
    "torch.floor({x} * 1.37 + 0.0123)",
    "{x}.remainder(0.77)",
    "torch.ones_like({x}) - {x}",
    "F.relu({x}) + torch.full_like({x}, 0.25)",
)
MODULES = (
    "nn.ReLU(inplace=True)",
    "nn.ReLU()",
    "nn.ReLU6(inplace=True)",
    "nn.SiLU(inplace=True)",
    "nn.Hardswish(inplace=True)",
    "nn.GELU()",
    "nn.LeakyReLU(0.1)",
    "nn.ELU(inplace=True)",
    "nn.Sequential(nn.ReLU(), nn.Dropout(0.3))",
    "nn.Dropout2d(0.2)",
    "nn.Hardsigmoid()",
    "nn.Sigmoid()",
    "nn.Softplus(beta=2)",
    "nn.Tanh()",
    "nn.Identity()",
    "nn.PReLU()",
    "nn.Threshold(0.1, 0.7)",
    "nn.Mish()",
    "nn.AlphaDropout(0.1)",
    "nn.RReLU()",
)


@op("activation", 2)
def activation(b: Frame) -> str:
    """An activation with f(0) = 0, written as a function."""
    return str(b.pick("f", KEEP_ZERO)).format(x=b.take())


@op("activation, f(0) != 0", 2)
def activation_odd(b: Frame) -> str:
    """An activation with f(0) != 0."""
    return str(b.pick("f", SHIFT_ZERO)).format(x=b.take())


@op("activation", 2)
def activation_module(b: Frame) -> str:
    """An activation module; those that work in place write into their input."""
    x = b.take()
    code = str(b.pick("f", MODULES))
    if "inplace" in code:
        b.writing(x)
    return f"{b.module(code)}({x})"


@op("prelu")
def prelu(b: Frame) -> str:
    """A leaky slope per channel."""
    x = b.take(accept=lambda t: t.rank >= 2)
    if b.flag("functional"):
        return f"F.prelu({x}, {b.param(x.dims[0])})"
    return f"{b.module(f'nn.PReLU({x.dims[0]})')}({x})"


@op("batch norm", 3)
def batch_norm(b: Frame) -> str:
    """Batch norm in all its options, and written out with buffers."""
    x = b.take(accept=lambda t: 2 <= t.rank <= 5)
    c, nd = x.dims[0], max(1, x.rank - 2)
    form = b.pick("form", ("", "", "", "affine=False", "track_running_stats=False", "frozen", "functional", "bare"))
    if form == "frozen":
        shape = f"({', '.join(['1', str(c), *['1'] * (x.rank - 2)])})"
        mean, scale = b.buffer(f"torch.zeros({c})"), b.buffer(f"torch.ones({c})")
        return f"({x} - {mean}.view{shape}) * {scale}.view{shape}"
    if form == "functional":
        var = b.buffer(f"torch.ones({c}) * 0.7")
        return f"F.batch_norm({x}, {b.buffer(f'torch.zeros({c})')}, {var} ** 2 + 0.1, {b.param(c)}, None)"
    if form == "bare":
        mean = f"{x}.mean({tuple(i for i in range(x.rank) if i not in (0, 1))}, keepdim=True)" if x.rank > 2 else "0.1"
        return f"({x} - {mean}) * {b.param(c, *[1] * (x.rank - 2))}"
    comma = ", " if form else ""
    return f"{b.module(f'nn.BatchNorm{nd}d({c}{comma}{form})')}({x})"


@op("layer norm", 2)
def layer_norm(b: Frame) -> str:
    """Layer norm over one or several last dimensions, or over the channels of an image."""
    x = b.take(accept=lambda t: t.dims[-1] > 1 and t.size <= 400)
    form = b.pick("form", ("last", "two", "image", "plain", "hand"))
    if form == "two" and x.rank >= 3:
        return f"{b.module(f'nn.LayerNorm({list(x.dims[-2:])})')}({x})"
    if form == "image" and image(x):
        return f"{b.module(f'nn.LayerNorm({x.dims[0]})')}({x}.movedim(1, -1)).movedim(-1, 1)"
    if form == "plain":
        return f"F.layer_norm({x}, ({x.dims[-1]},))"
    if form == "hand":
        centred = b.let(f"{x} - {x}.mean(-1, keepdim=True)")
        variance = f"{centred}.pow(2).mean(-1, keepdim=True)"
        return f"{centred} * torch.rsqrt({variance} + 0.01) * {b.param(x.dims[-1])} + {b.param(x.dims[-1])}"
    bias = ", bias=False" if b.flag("no_bias") else ""
    return f"{b.module(f'nn.LayerNorm({x.dims[-1]}{bias})')}({x})"


@op("rms norm")
def rms_norm(b: Frame) -> str:
    """``nn.RMSNorm``, by hand, and unit length along channels."""
    x = b.take(accept=lambda t: t.dims[-1] > 1)
    form = b.pick("form", ("module", "hand", "normalize", "normalize_channels"))
    if form == "module":
        return f"{b.module(f'nn.RMSNorm({x.dims[-1]}, eps=1e-3)')}({x})"
    if form == "hand":
        return f"{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-2) * {b.param(x.dims[-1])}"
    return f"F.normalize({x}, dim={-1 if form == 'normalize' else 1}, eps=1e-2)"


@op("group norm", 1.5)
def group_norm(b: Frame) -> str:
    """Group norm with any number of groups."""
    x = b.take(accept=lambda t: t.rank >= 3)
    groups = b.pick("groups", divisors(x.dims[0]))
    affine = ", affine=False" if b.flag("plain") else ""
    return f"{b.module(f'nn.GroupNorm({groups}, {x.dims[0]}{affine})')}({x})"


@op("instance norm")
def instance_norm(b: Frame) -> str:
    """Instance norm without and with parameters and statistics."""
    x = b.take(accept=lambda t: image(t) and t.size > t.dims[0])
    options = b.pick("form", ("", ", affine=True", ", affine=True, track_running_stats=True"))
    return f"{b.module(f'nn.InstanceNorm{x.rank - 2}d({x.dims[0]}{options})')}({x})"


def _broadcast(x: T, y: T) -> bool:
    """Whether y broadcasts into x without enlarging the batch."""
    if y.rank > x.rank or (y.rank == x.rank and y.times != x.times) or y.rank < x.rank:
        return False
    return all(a == b or b == 1 for a, b in zip(x.dims, y.dims, strict=True))


COMBINE = (
    "{x} + {y}",
    "{x} * {y}",
    "{x} - {y}",
    "{x} / (1.3 + torch.tanh({y}))",
    "torch.maximum({x}, {y})",
    "torch.minimum({y}, {x})",
    "torch.add({y}, {x}, alpha=0.5)",
    "{y} - {x}",
    "torch.lerp({x}, {y}.expand_as({x}), 0.3)",
    "torch.where({x} > {y}, {x}, {y} * 0.5)",
    "{x} * torch.sigmoid({y}) + {y}",
    "torch.sum(torch.stack([{x}, {y}.expand_as({x})]), 0)",
    "torch.addcmul({x}, {y}, {x}, value=0.5)",
    "torch.hypot({x}, {y} + 1.0)",
    "{x} * (1 - torch.sigmoid({y})) + torch.tanh({x})",
)


@op("add, mul, broadcasting", 4)
def combine(b: Frame) -> str:
    """Two tensors that broadcast."""
    x = b.take()
    y = b.take("y", lambda t: _broadcast(x, t) and t.name != x.name)
    return str(b.pick("f", COMBINE)).format(x=x, y=y)


@op("add, mul, broadcasting", 4)
def join(b: Frame) -> str:
    """Two tensors of unequal width: a layer makes them match, then they are added, multiplied or concatenated."""
    x = b.take(accept=lambda t: 2 <= t.rank <= 5)
    y = b.take("y", lambda t: t.rank == x.rank and t.times == x.times and t.dims[1:] == x.dims[1:])
    if image(x):
        bias = ", bias=False" if b.flag("no_bias") else ""
        layer = b.module(f"nn.Conv{x.rank - 2}d({y.dims[0]}, {x.dims[0]}, 1{bias})")
    else:
        layer = b.module(f"nn.Linear({y.dims[0]}, {x.dims[0]})")
    form = b.pick("form", ("add", "iadd", "mul", "sub", "cat", "relu_add"))
    matched = f"{layer}({y})"
    if form == "iadd":
        own = b.let(matched)
        b.line(f"{own} += {x}")
        return own
    forms = {"mul": "{x} * {m}", "sub": "{m} - {x}", "cat": "torch.cat([{x}, {m}], 1)", "relu_add": "F.relu({x} + {m})"}
    return forms.get(form, "{x} + {m}").format(x=x, m=matched)


@op("gates and scales", 1.5)
def scale(b: Frame) -> str:
    """Layer scale, a learned scalar, a learned shift: parameters that broadcast."""
    x = b.take()
    c = x.dims[0]
    over = [1] * (x.rank - 2)
    form = b.pick("form", ("channel", "scalar", "last", "shift", "zero_dim", "both", "gain"))
    if form == "channel":
        return f"{x} * {b.param(c, *over)}"
    if form == "scalar":
        return f"{x} * {b.param(1)}"
    if form == "last":
        return f"{b.param(x.dims[-1])} * {x}"
    if form == "shift":
        return f"{x} + {b.param(1, c, *over)}"
    if form == "zero_dim":
        return f"{x} * {b.param()} + {b.param()}"
    if form == "gain":
        return f"(1 + {b.param(c, *over)}) * {x}"
    return f"{x} * {b.param(1, c, *over)} + {b.param(c, *over)}"


@op("gates and scales", 2)
def squeeze_excite(b: Frame) -> str:
    """A gate per channel from the pooled image."""
    x = b.take(accept=lambda t: 3 <= t.rank <= 5)
    c, nd, squeeze = x.dims[0], x.rank - 2, b.width("squeeze")
    spatial = tuple(range(2, x.rank))
    gate = b.pick("gate", ("torch.sigmoid({s})", "F.hardsigmoid({s})", "torch.tanh({s}) + 1", "F.softmax({s}, 1)"))
    act = b.pick("act", ("F.relu({s})", "F.silu({s})", "torch.sigmoid({s})"))
    if b.flag("linear"):
        s = b.let(f"{x}.mean({spatial})")
        s = b.let(act.format(s=f"{b.module(f'nn.Linear({c}, {squeeze})')}({s})"))
        s = b.let(gate.format(s=f"{b.module(f'nn.Linear({squeeze}, {c})')}({s})"))
        s = f"{s}.view(-1, {c}{', 1' * nd})"
    else:
        s = b.let(f"F.adaptive_avg_pool{nd}d({x}, 1)")
        s = b.let(act.format(s=f"{b.module(f'nn.Conv{nd}d({c}, {squeeze}, 1)')}({s})"))
        s = b.let(gate.format(s=f"{b.module(f'nn.Conv{nd}d({squeeze}, {c}, 1)')}({s})"))
    form = b.pick("form", ("{x} * {s}", "{s}.expand_as({x}) * {x}", "{x} + {x} * {s}", "{x} * {s} + (1 - {s})"))
    return form.format(x=x, s=s)


@op("gates and scales")
def spatial_gate(b: Frame) -> str:
    """A gate per pixel from the mean and maximum over channels (CBAM), or per channel from a 1D convolution (ECA)."""
    x = b.take(accept=plane)
    if b.flag("eca"):
        pooled = b.let(f"{x}.mean((2, 3)).unsqueeze(1)")
        return f"{x} * torch.sigmoid({b.module('nn.Conv1d(1, 1, 3, padding=1)')}({pooled})).view(-1, {x.dims[0]}, 1, 1)"
    both = b.let(f"torch.cat([{x}.mean(1, keepdim=True), {x}.amax(1, keepdim=True)], 1)")
    return f"{x} * torch.sigmoid({b.module('nn.Conv2d(2, 1, 3, padding=1)')}({both}))"


@op("glu", 1.5)
def glu(b: Frame) -> str:
    """GLU, SwiGLU and GEGLU: half of the channels gate the other half."""
    x = b.take(accept=lambda t: t.rank >= 2)
    form = b.pick("form", ("last", "channels", "swiglu", "chunk", "fused"))
    if form in ("last", "channels"):
        dim = -1 if form == "last" else 1
        b.need(x.shape[dim] % 2 == 0)
        return f"F.glu({x}, {dim})"
    if form == "chunk":
        b.need(x.dims[-1] % 2 == 0)
        first, second = b.unpack(f"{x}.chunk(2, dim=-1)", 2)
        return f"{first} * F.gelu({second})"
    hidden, i = b.width("hidden"), x.dims[-1]
    b.need(i <= 64)
    if form == "fused":
        a, g = b.unpack(f"{b.module(f'nn.Linear({i}, {2 * hidden})')}({x}).chunk(2, -1)", 2)
        product = f"F.silu({g}) * {a}"
    else:
        product = f"F.silu({b.module(f'nn.Linear({i}, {hidden}, bias=False)')}({x}))"
        product += f" * {b.module(f'nn.Linear({i}, {hidden}, bias=False)')}({x})"
    return f"{b.module(f'nn.Linear({hidden}, {i})')}({product})"


@op("softmax")
def softmax(b: Frame) -> str:
    """Softmax and friends along any dimension but the batch."""
    x = b.take()
    name = b.pick("f", ("F.softmax", "F.log_softmax", "F.softmin"))
    return f"{name}({x}, dim={b.pick('dim', list(range(1, x.rank)))})"


@op("layer norm", 0.5)
def token_norm(b: Frame) -> str:
    """A pre-norm MLP with a shortcut."""
    x = b.take(accept=sequence)
    c, hidden = x.dims[-1], b.width("hidden")
    inner = f"F.gelu({b.module(f'nn.Linear({c}, {hidden})')}({b.module(f'nn.LayerNorm({c})')}({x})))"
    return f"{x} + {b.module(f'nn.Linear({hidden}, {c})')}({inner})"
