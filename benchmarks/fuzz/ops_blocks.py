"""Blocks of published networks, and weights that are used more than once."""

from __future__ import annotations

from .build import Frame
from .catalogue import image, op, plane


@op("residual blocks", 2.5)
def basic_block(b: Frame) -> str:
    """Two convolutions around a shortcut (identity, strided with a 1x1 convolution, or padded with zero channels)."""
    x = b.take(accept=image)
    nd, c = x.rank - 2, x.dims[0]
    kind = b.pick("shortcut", ("identity", "conv", "pad"))
    grow = b.pick("grow", (0, 2)) if kind != "identity" else 0
    out, stride = c + grow, 1 if kind == "identity" else 2
    mid = b.width("mid")
    first = b.module(f"nn.Conv{nd}d({c}, {mid}, 3, stride={stride}, padding=1, bias=False)")
    norm, second = b.module(f"nn.BatchNorm{nd}d({mid})"), b.module(f"nn.Conv{nd}d({mid}, {out}, 3, padding=1)")
    y = b.let(f"{b.module(f'nn.BatchNorm{nd}d({out})')}({second}(F.relu({norm}({first}({x})))))")
    skip = str(x)
    if kind == "conv":
        skip = f"{b.module(f'nn.Conv{nd}d({c}, {out}, 1, stride=2)')}({x})"
    elif kind == "pad":
        skip = f"F.pad({x}[:, :{', ::2' * nd}], {(0, 0) * nd + (grow // 2, grow - grow // 2)})"
    if b.flag("inplace"):
        b.line(f"{y} += {skip}")
        return f"F.relu({y})"
    return f"F.relu({y} + {skip})"


@op("residual blocks")
def inverted(b: Frame) -> str:
    """Expansion, depthwise convolution, projection."""
    x = b.take(accept=image)
    nd, c = x.rank - 2, x.dims[0]
    hidden = c * b.pick("expand", (2, 1, 3))
    b.need(hidden <= 16)
    y = f"F.relu6({b.module(f'nn.Conv{nd}d({c}, {hidden}, 1, bias=False)')}({x}))"
    y = b.let(f"{b.module(f'nn.Conv{nd}d({hidden}, {hidden}, 3, padding=1, groups={hidden})')}({y})")
    act = b.pick("act", ("F.relu", "torch.sigmoid", "F.hardswish"))
    y = f"{b.module(f'nn.Conv{nd}d({hidden}, {c}, 1)')}({act}({y}))"
    return f"{x} + {y}" if b.flag("residual") else y


@op("dense, CSP, Res2Net")
def res2net(b: Frame) -> str:
    """Splits, each added to the one before and convolved, concatenated again."""
    x = b.take(accept=lambda t: image(t) and t.dims[0] % 3 == 0)
    nd, part = x.rank - 2, x.dims[0] // 3
    p, q, r = b.unpack(f"torch.split({x}, {part}, 1)", 3)
    one = b.let(f"F.relu({b.module(f'nn.Conv{nd}d({part}, {part}, 3, padding=1)')}({q}))")
    two = b.let(f"F.relu({b.module(f'nn.Conv{nd}d({part}, {part}, 3, padding=1)')}({r} + {one}))")
    order = b.pick("order", (f"{p}, {one}, {two}", f"{one}, {two}, {p}"))
    return f"torch.cat([{order}], 1)"


@op("dense, CSP, Res2Net")
def csp(b: Frame) -> str:
    """Cross-stage partial (YOLO's C2f): halves, a chain of bottlenecks, everything concatenated."""
    x = b.take(accept=image)
    nd, c, hidden = x.rank - 2, x.dims[0], b.width("hidden")
    one, two = b.unpack(f"{b.module(f'nn.Conv{nd}d({c}, {2 * hidden}, 1)')}({x}).chunk(2, 1)", 2)
    parts, last = [one, two], two
    for _ in range(b.pick("depth", (1, 2))):
        new = b.let(f"F.silu({b.module(f'nn.Conv{nd}d({hidden}, {hidden}, 3, padding=1)')}({last}))")
        if b.flag("add"):
            new = b.let(f"{last} + {new}")
        parts.append(new)
        last = new
    return f"{b.module(f'nn.Conv{nd}d({len(parts) * hidden}, {b.width()}, 1)')}(torch.cat([{', '.join(parts)}], 1))"


@op("dense, CSP, Res2Net")
def dense(b: Frame) -> str:
    """Dense layers: norm, activation, convolution, concatenation."""
    x = b.take(accept=lambda t: image(t) and t.dims[0] <= 8)
    nd, c, growth = x.rank - 2, x.dims[0], b.pick("growth", (2, 3))
    features = str(x)
    for _ in range(b.pick("depth", (1, 2))):
        norm = b.module(f"nn.BatchNorm{nd}d({c})")
        new = b.let(f"{b.module(f'nn.Conv{nd}d({c}, {growth}, 3, padding=1, bias=False)')}(F.relu({norm}({features})))")
        features = b.let(
            f"torch.cat([{new}, {features}], 1)" if b.flag("front") else f"torch.cat([{features}, {new}], 1)"
        )
        c += growth
    return b.let(f"{features} * 1.0")


@op("split attention, selective kernels")
def split_attention(b: Frame) -> str:
    """ResNeSt: radix splits of a grouped convolution weighted by a softmax over the radix."""
    x = b.take(accept=plane)
    c, out, cards = x.dims[0], 2 * b.pick("half", (1, 2, 3)), b.pick("cards", (1, 2))
    groups = 2 * cards if c % (2 * cards) == 0 and b.flag("grouped") else 1
    y = b.let(f"F.relu({b.module(f'nn.Conv2d({c}, {2 * out}, 3, padding=1, groups={groups})')}({x}))")
    parts = b.let(f"{y}.view(-1, 2, {out}, {x.dims[1]}, {x.dims[2]})")
    pooled = b.let(f"{parts}.sum(1).mean((2, 3), keepdim=True)")
    squeeze = b.width("squeeze")
    hidden = f"F.relu({b.module(f'nn.Conv2d({out}, {squeeze}, 1)')}({pooled}))"
    logits = b.let(f"{b.module(f'nn.Conv2d({squeeze}, {2 * out}, 1)')}({hidden})")
    if cards == 1:
        weights = b.let(f"F.softmax({logits}.view(-1, 2, {out}), dim=1).view(-1, 2, {out}, 1, 1)")
    else:
        weights = b.let(f"{logits}.view(-1, {cards}, 2, {out // cards}).transpose(1, 2).softmax(1)")
        weights = b.let(f"{weights}.reshape(-1, 2, {out}, 1, 1)")
    return f"({weights} * {parts}).sum(dim=1)"


@op("split attention, selective kernels")
def selective(b: Frame) -> str:
    """Selective kernels: branches weighted by a softmax over branches."""
    x = b.take(accept=plane)
    c, out, squeeze = x.dims[0], b.width(), b.width("squeeze")
    first = b.let(f"F.relu({b.module(f'nn.Conv2d({c}, {out}, 3, padding=1)')}({x}))")
    second = b.let(f"F.relu({b.module(f'nn.Conv2d({c}, {out}, 3, padding=2, dilation=2)')}({x}))")
    pooled = b.let(f"({first} + {second}).mean((2, 3))")
    z = b.let(f"F.relu({b.module(f'nn.Linear({out}, {squeeze})')}({pooled}))")
    a, c2 = (f"{b.module(f'nn.Linear({squeeze}, {out})')}({z})" for _ in "ab")
    weights = b.let(f"torch.softmax(torch.stack([{a}, {c2}], 1), 1)")
    if b.flag("stacked"):
        return f"(torch.stack([{first}, {second}], 1) * {weights}[..., None, None]).sum(1)"
    return f"{first} * {weights}[:, 0, :, None, None] + {second} * {weights}[:, 1, :, None, None]"


@op("shared and tied", 2)
def again(b: Frame) -> str:
    """A module that ran before runs once more, on another tensor."""
    name, step, dims = b.pick_shared()
    x = b.take("x", lambda t: len(t.dims) == len(dims) and (t.dims[0] == dims[0] or t.dims[-1] == dims[-1]))
    return f"self.{name}({x})"


@op("shared and tied")
def tied(b: Frame) -> str:
    """A layer whose weight is an earlier layer's (transposed at times), or a tied decoder of an embedding."""
    name, _, _ = b.pick_shared(("Linear", "Embedding", "Conv"))
    shape = b.weight_shape(name)
    flat = len(shape) == 2
    form = b.pick("f", ("linear", "transposed", "matmul")) if flat else "conv"
    width = {"linear": shape[1], "transposed": shape[0], "matmul": shape[0], "conv": shape[1]}[form]
    weight = f"self.{name}.weight"
    if form == "conv":
        x = b.take("x", lambda t: t.rank == len(shape) and t.dims[0] == width)
        return f"F.conv{x.rank - 2}d({x}, {weight}, None, 1, 1)"
    x = b.take("x", lambda t: 2 <= t.rank <= 4 and t.dims[-1] == width)
    if form == "matmul":
        return f"{x} @ {weight} * 0.5"
    return f"F.linear({x}, {weight}{'.t()' if form == 'transposed' else ''})"


@op("shared and tied", 0.7)
def weight_outside(b: Frame) -> str:
    """A weight used outside its layer: its norm, its mean, one of its rows."""
    name, _, _ = b.pick_shared(("Linear", "Embedding", "Conv"))
    x = b.take("x")
    form = b.pick("f", ("norm", "bias", "row", "mean"))
    weight = f"self.{name}.weight"
    if form == "norm":
        return f"{x} / ({weight}.norm() + 1)"
    if form == "bias":
        return f"{x} + self.{name}.bias[0]"
    if form == "row":
        return f"{x} * {weight}.flatten(1)[0, 0]"
    return f"{x} + {weight}.mean()"


@op("buffers", 0.7)
def constant(b: Frame) -> str:
    """Buffers and tensors made in ``forward``."""
    x = b.take()
    n = x.dims[-1]
    form = b.pick("f", ("buffer", "arange", "linspace", "channels", "mask", "zeros_cat"))
    if form == "buffer":
        return f"{x} + {b.buffer(f'torch.ones({n})')}"
    if form == "arange":
        return f"{x} * torch.arange({n}, dtype={x}.dtype).add(1).rsqrt()"
    if form == "linspace":
        return f"{x} + torch.linspace(-0.4, 0.5, {n}, dtype={x}.dtype)"
    if form == "mask":
        keep = [float(i % 2) for i in range(x.dims[0])]
        return f"{x} * {b.buffer(f'torch.tensor({keep})')}.bool().view({', '.join(['-1', *['1'] * (x.rank - 2)])})"
    if form == "channels":
        return f"{x} * {b.buffer(f'torch.ones({x.dims[0]})')}.view({', '.join(['1', '-1', *['1'] * (x.rank - 2)])})"
    return f"torch.cat([{x}, torch.zeros_like({x}[:, :1])], 1)"


@op("head", 0.0)
def head(b: Frame) -> str:
    """The end of a network: pooled or flattened, then a layer of few outputs."""
    x = b.take()
    form = b.pick("f", ("pool", "flatten", "last", "conv"))
    if form == "conv" and image(x):
        return f"{b.module(f'nn.Conv{x.rank - 2}d({x.dims[0]}, 2, 1)')}({x})"
    if form == "last" or x.rank == 2:
        return f"{b.module(f'nn.Linear({x.dims[-1]}, 3)')}({x})"
    if form == "flatten":
        b.need(x.size <= 600)
        return f"{b.module(f'nn.Linear({x.size}, 3)')}({x}.flatten(1))"
    dims = tuple(range(2, x.rank))
    return f"{b.module(f'nn.Linear({x.dims[0]}, 3)')}({x}.mean({dims}))"
