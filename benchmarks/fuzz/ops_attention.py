"""Attention in the ways people write it, windows, patches, recurrent layers."""

from __future__ import annotations

from .build import Frame, T
from .catalogue import op, plane, sequence


def _tokens(t: T) -> bool:
    return sequence(t) and t.dims[0] <= 40 and t.dims[1] <= 16


def _heads(b: Frame) -> tuple[int, int]:
    """Number of heads and their width."""
    return b.pick("heads", (2, 1, 3, 4)), b.pick("head_dim", (2, 3, 4))


def _rows(head: int, dim: int, block: int = 0) -> list[int]:
    return list(range(block + head * dim, block + (head + 1) * dim))


CORES = ("sdpa", "matmul", "einsum", "baddbmm", "causal", "bias", "relu", "mask", "relative", "rotary", "cosine")


def _attend(b: Frame, q: str, k: str, v: str, sizes: tuple[int, int, int, int]) -> str:
    """softmax(q k') v in one of its spellings; q is (B, H, N, D), k and v are (B, H, M, D)."""
    heads, dim, n, m = sizes
    form = b.pick("core", CORES)
    if form == "sdpa":
        return f"F.scaled_dot_product_attention({q}, {k}, {v})"
    if form == "causal":
        return f"F.scaled_dot_product_attention({q}, {k}, {v}, is_causal=True)"
    if form == "bias":
        return (
            f"F.scaled_dot_product_attention({q}, {k}, {v}, attn_mask={b.param(1, b.pick('each', (1, heads)), n, m)})"
        )
    if form == "relu":
        return f"(F.relu({q} @ {k}.transpose(-2, -1)) / {m}) @ {v}"
    if form == "rotary" and dim % 2 == 0:
        q, k = _rotated(b, q, n, dim), _rotated(b, k, m, dim)
    if form == "cosine":
        q, k = f"F.normalize({q}, dim=-1, eps=1e-2)", f"F.normalize({k}, dim=-1, eps=1e-2)"
    if form == "einsum":
        scores = b.let(f'torch.einsum("bhid,bhjd->bhij", {q}, {k}) * {dim**-0.5}')
        return f'torch.einsum("bhij,bhjd->bhid", {scores}.softmax(-1), {v})'
    scores = b.let(f"({q} * {dim**-0.5}) @ {k}.transpose(-2, -1)")
    if form == "baddbmm":
        scores = f"{scores} + {b.param(heads, n, m)}"
    elif form == "cosine":
        scores = f"{scores} * {b.param(heads, 1, 1)}.exp()"
    elif form == "mask":
        upper = b.buffer(f"torch.ones({n}, {m}).triu(1).bool()")
        scores = f'{scores}.masked_fill({upper}, float("-inf"))'
    elif form == "relative":  # Swin: a table of one column per head, looked up by a buffer
        index = b.buffer(f"(torch.arange({n})[:, None] - torch.arange({m}) + {m - 1}).flatten()")
        scores = f"{scores} + {b.param(n + m - 1, heads)}[{index}].view({n}, {m}, {heads}).permute(2, 0, 1)"
    return f"torch.matmul(F.dropout(torch.softmax({scores}, dim=-1), 0.1, self.training), {v})"


def _rotated(b: Frame, x: str, tokens: int, dim: int) -> str:
    """Rotary position embedding."""
    x = b.let(x)
    angle = b.let(
        f"torch.arange({tokens}, dtype={x}.dtype)[:, None] * torch.arange(1, {dim + 1}, dtype={x}.dtype) * 0.3"
    )
    half = dim // 2
    return b.let(f"{x} * {angle}.cos() + torch.cat([-{x}[..., {half}:], {x}[..., :{half}]], -1) * {angle}.sin()")


def _project(b: Frame, heads: int, dim: int, out: int, values: list[tuple[str, int]]) -> str:
    """The output layer; every head's weights are declared, so that masks can remove whole heads."""
    layer = b.module(f"nn.Linear({heads * dim}, {out})")
    for h in range(heads):
        b.head(
            (f"{layer}.weight", 1, _rows(h, dim)),
            *[(f"{name}.weight", 0, _rows(h, dim, block)) for name, block in values],
            *[(f"{name}.bias", 0, _rows(h, dim, block)) for name, block in values],
        )
    return layer


@op("attention", 2)
def attention_fused(b: Frame) -> str:
    """One linear layer for queries, keys and values, reshaped or chunked."""
    x = b.take(accept=_tokens)
    (n, c), (h, d) = x.dims, _heads(b)
    form = b.pick("f", ("reshape", "chunk", "interleaved", "split", "unbind_last"))
    qkv = b.module(f"nn.Linear({c}, {3 * h * d})")
    fused = b.let(f"{qkv}({x})")
    if form == "reshape":  # (B, N, 3, H, D)
        q, k, v = b.unpack(f"{fused}.reshape(-1, {n}, 3, {h}, {d}).permute(2, 0, 3, 1, 4).unbind(0)", 3)
    elif form == "unbind_last":
        q, k, v = b.unpack(f"{fused}.view(-1, {n}, 3, {h}, {d}).transpose(1, 3).unbind(2)", 3)
    elif form == "interleaved":  # (B, N, H, 3 D)
        q, k, v = b.unpack(f"{fused}.view(-1, {n}, {h}, {3 * d}).transpose(1, 2).chunk(3, dim=-1)", 3)
    else:
        code = f"{fused}.chunk(3, dim=-1)" if form == "chunk" else f"{fused}.split({h * d}, dim=2)"
        q, k, v = (f"{part}.view(-1, {n}, {h}, {d}).transpose(1, 2)" for part in b.unpack(code, 3))
        q, k, v = b.let(q), b.let(k), b.let(v)
    values = [(qkv, i * h * d) for i in range(3)] if form in ("reshape", "chunk", "split", "unbind_last") else []
    layer = _project(b, h, d, c, values)
    out = b.let(_attend(b, q, k, v, (h, d, n, n)))
    return _residual(b, x, f"{layer}({out}.transpose(1, 2).reshape(-1, {n}, {h * d}))")


def _residual(b: Frame, x: T, code: str) -> str:
    return f"{x} + {code}" if b.flag("residual") else code


@op("attention", 2)
def attention_apart(b: Frame) -> str:
    """Three linear layers; keys and values of another tensor at times, fewer of them at times (grouped queries)."""
    x = b.take(accept=_tokens)
    y = b.take("y", _tokens) if b.flag("cross") else x
    b.need(x.times == y.times)
    (n, c), (m, e), (h, d) = x.dims, y.dims, _heads(b)
    few = b.pick("groups", [g for g in (h, h, 1, 2) if h % g == 0])
    query = b.module(f"nn.Linear({c}, {h * d})")
    bias = ", bias=False" if b.flag("no_bias") else ""
    key, value = b.module(f"nn.Linear({e}, {few * d})"), b.module(f"nn.Linear({e}, {few * d}{bias})")
    q = b.let(f"{query}({x}).view(-1, {n}, {h}, {d}).transpose(1, 2)")
    k = b.let(f"{key}({y}).view(-1, {m}, {few}, {d}).transpose(1, 2)")
    v = b.let(f"{value}({y}).view(-1, {m}, {few}, {d}).transpose(1, 2)")
    if few < h:
        form = b.pick("spread", ("repeat", "expand", "enable_gqa"))
        if form == "enable_gqa":
            out = b.let(f"F.scaled_dot_product_attention({q}, {k}, {v}, enable_gqa=True)")
        else:
            k, v = (b.let(_spread(name, form, h, few, m, d)) for name in (k, v))
    declared = [(query, 0), (key, 0), (value, 0)] if few == h and not bias else [(query, 0)]
    layer = _project(b, h, d, c, declared)
    if few == h or form != "enable_gqa":
        out = b.let(_attend(b, q, k, v, (h, d, n, m)))
    return _residual(b, x, f"{layer}({out}.transpose(1, 2).flatten(2))")


def _spread(name: str, form: str, heads: int, few: int, tokens: int, dim: int) -> str:
    if form == "repeat":
        return f"{name}.repeat_interleave({heads // few}, dim=1)"
    wide = f"{name}[:, :, None].expand(-1, -1, {heads // few}, -1, -1)"
    return f"{wide}.reshape(-1, {heads}, {tokens}, {dim})"


@op("attention", 1.5)
def attention_module(b: Frame) -> str:
    """``nn.MultiheadAttention``."""
    x = b.take(accept=_tokens)
    n, c = x.dims
    heads = b.pick("heads", [h for h in (1, 2, 3, 4) if c % h == 0])
    options = b.pick("options", ("", ", bias=False", ", add_bias_kv=True", ", add_zero_attn=True"))
    attend = b.module(f"nn.MultiheadAttention({c}, {heads}, batch_first=True{options})")
    d = c // heads
    for h in range(heads):
        rows = [*_rows(h, d), *_rows(h, d, c), *_rows(h, d, 2 * c)]
        inner = [(f"{attend}.in_proj_weight", 0, rows), (f"{attend}.out_proj.weight", 1, _rows(h, d))]
        b.head(*inner, *([] if "bias=False" in options else [(f"{attend}.in_proj_bias", 0, rows)]))
    y = b.take("y", lambda t: _tokens(t) and t.dims[1] == c and t.times == x.times) if b.flag("cross") else x
    weights = ", need_weights=False" if b.flag("no_weights") else ""
    return _residual(b, x, f"{attend}({x}, {y}, {y}{weights})[0]")


@op("attention", 0.7)
def attention_single(b: Frame) -> str:
    """One head without reshaping; over pixels, over channels, or linear attention."""
    x = b.take(accept=lambda t: sequence(t) and t.size <= 300 or plane(t) and t.size <= 300)
    d = b.width("d")
    if plane(x):  # non-local block, 1x1 convolutions
        c, (h, w) = x.dims[0], x.dims[1:]
        q, k = (b.let(f"{b.module(f'nn.Conv2d({c}, {d}, 1)')}({x}).flatten(2)") for _ in "qk")
        v = b.let(f"{b.module(f'nn.Conv2d({c}, {d}, 1)')}({x}).flatten(2)")
        if b.flag("channels"):  # transposed attention: channels attend to channels
            out = f"torch.softmax({q} @ {k}.transpose(1, 2), -1) @ {v}"
        else:
            out = f"{v} @ torch.softmax({q}.transpose(1, 2) @ {k}, -1).transpose(1, 2)"
        out = b.let(f"({out}).view(-1, {d}, {h}, {w})")
        return f"{x} + {b.module(f'nn.Conv2d({d}, {c}, 1)')}({out})"
    c = x.dims[1]
    q, k, v = (b.let(f"{b.module(f'nn.Linear({c}, {d})')}({x})") for _ in "qkv")
    if b.flag("fused"):
        out = f"F.scaled_dot_product_attention({q}, {k}, {v})"
    elif b.flag("linear"):
        out = f"F.softmax({q}, -1) @ (F.softmax({k}, 1).transpose(1, 2) @ {v})"
    else:
        out = f"torch.softmax({q} @ {k}.transpose(1, 2) / {d**0.5}, -1) @ {v}"
    return f"{b.module(f'nn.Linear({d}, {c})')}({out})"


@op("attention", 0.7)
def encoder_layer(b: Frame) -> str:
    """``nn.TransformerEncoderLayer``."""
    x = b.take(accept=lambda t: _tokens(t) and t.dims[1] % 2 == 0)
    first = ", norm_first=True" if b.flag("norm_first") else ""
    act = ', activation="gelu"' if b.flag("gelu") else ""
    layer = f"nn.TransformerEncoderLayer({x.dims[1]}, 2, {b.width('hidden')}, batch_first=True{first}{act})"
    return f"{b.module(layer)}({x})"


@op("window, patch merging")
def window(b: Frame) -> str:
    """Window partition into the batch, a linear layer or attention inside, and back."""
    x = b.take(accept=lambda t: plane(t) and t.dims[1] % 2 == 0 and t.dims[2] % 2 == 0 and t.dims[0] <= 12)
    c, h, w = x.dims
    shift = b.flag("shift")
    y = b.let(f"{x}.permute(0, 2, 3, 1)" + (".roll((-1, -1), (1, 2))" if shift else ""))
    t = b.let(f"{y}.reshape(-1, {h // 2}, 2, {w // 2}, 2, {c}).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, {c})")
    if b.flag("attend"):
        d = b.width("d")
        q, k, v = (b.let(f"{b.module(f'nn.Linear({c}, {d})')}({t})") for _ in "qkv")
        t = b.let(f"torch.softmax({q} @ {k}.transpose(1, 2), -1) @ {v}")
    else:
        d = c
        t = b.let(f"F.gelu({b.module(f'nn.Linear({c}, {c})')}({t}))")
    back = f"{t}.view(-1, {h // 2}, {w // 2}, 2, 2, {d}).permute(0, 1, 3, 2, 4, 5).reshape(-1, {h}, {w}, {d})"
    return back + (".roll((1, 1), (1, 2))" if shift else "") + ".permute(0, 3, 1, 2)"


@op("window, patch merging")
def patches(b: Frame) -> str:
    """Patch merging on channels last, patch embedding, and the way back from tokens to an image."""
    x = b.take(accept=lambda t: plane(t) or sequence(t))
    if sequence(x):
        n, c = x.dims
        side = [s for s in range(1, n + 1) if n % s == 0]
        h = b.pick("height", side)
        return f"{x}.transpose(1, 2).reshape(-1, {c}, {h}, {n // h})"
    c, h, w = x.dims
    if not b.flag("merge"):
        b.need(h >= 2 and w >= 2)
        return f"{b.module(f'nn.Conv2d({c}, {b.width()}, 2, stride=2)')}({x}).flatten(2).transpose(1, 2)"
    b.need(h % 2 == 0 and w % 2 == 0)
    y = b.let(f"{x}.permute(0, 2, 3, 1)")
    corners = f"{y}[:, 0::2, 0::2], {y}[:, 1::2, 0::2], {y}[:, 0::2, 1::2], {y}[:, 1::2, 1::2]"
    z = b.let(f"torch.cat([{corners}], -1)")
    norm = f"{b.module(f'nn.LayerNorm({4 * c})')}({z})" if b.flag("norm") else z
    return f"{b.module(f'nn.Linear({4 * c}, {b.width()}, bias=False)')}({norm})"


@op("recurrent", 1.2)
def recurrent(b: Frame) -> str:
    """LSTM, GRU, RNN: all steps, or the last state."""
    x = b.take(accept=lambda t: sequence(t) and t.dims[0] <= 12 and t.dims[1] <= 16)
    kind, hidden = b.pick("kind", ("GRU", "LSTM", "RNN")), b.pick("hidden", (2, 3, 4))
    options = b.pick("options", ("", ", bidirectional=True", ", num_layers=2"))
    if b.flag("cell"):
        return _cells(b, x, kind, hidden)
    call = f"{b.module(f'nn.{kind}({x.dims[1]}, {hidden}, batch_first=True{options})')}({x})"
    if b.flag("last"):
        state = f"{call}[1]" + ("[0]" if kind == "LSTM" else "")
        return f"{state}[-1]"
    return f"{call}[0]"


def _cells(b: Frame, x: T, kind: str, hidden: int) -> str:
    """A recurrent cell in a loop written out."""
    cell = b.module(f"nn.{kind}Cell({x.dims[1]}, {hidden})")
    state = b.let(f"{x}.new_zeros({x}.shape[0], {hidden})")
    if kind == "LSTM":
        state = b.let(f"({state}, {state})")
    states = []
    for step in range(min(3, x.dims[0])):
        state = b.let(f"{cell}({x}[:, {step}], {state})")
        states.append(f"{state}[0]" if kind == "LSTM" else state)
    return f"torch.stack([{', '.join(states)}], 1)" if b.flag("all") else states[-1]
