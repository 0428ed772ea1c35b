"""Data movement: views, slices, concatenations, shuffles; in-place writes; inputs used several times."""

from __future__ import annotations

from .build import Frame, T
from .catalogue import divisors, image, op, plane


def _axis(b: Frame, x: T, key: str = "dim") -> int:
    """A dimension that is not the batch; channels of an image are the simplest."""
    return int(b.pick(key, [*range(1, x.rank), 1, x.rank - 1]))


def _at(rank: int, dim: int, index: str) -> str:
    """``[:, :, 1:3]``: an index on one dimension."""
    return "[" + ", ".join(":" if i != dim else index for i in range(dim + 1)) + "]"


@op("view, permute", 2)
def reorder(b: Frame) -> str:
    """Transpose or permute dimensions other than the batch."""
    x = b.take(accept=lambda t: t.rank >= 3)
    one, two = b.pick("one", list(range(1, x.rank))), b.pick("two", list(range(x.rank - 1, 0, -1)))
    form = b.pick("f", ("transpose", "permute", "movedim", "swapaxes", "mT", "rot90", "diagonal"))
    if form == "rot90":
        return f"{x}.rot90(1, ({one}, {two}))"
    if form == "diagonal":
        b.need(x.rank >= 4)
        return f"{x}.diagonal(0, {one}, {two})"
    if form == "mT":
        return f"{x}.mT.contiguous()"
    if form == "permute":
        order = list(range(x.rank))
        order[one], order[two] = order[two], order[one]
        return f"{x}.permute({', '.join(map(str, order))})"
    return f"{x}.{form}({one}, {two})"


@op("view, permute", 2)
def flatten(b: Frame) -> str:
    """Merge neighbouring dimensions, the batch included at times."""
    x = b.take(accept=lambda t: t.rank >= 3)
    start = b.pick("start", [*range(1, x.rank - 1), 1, 0])
    end = b.pick("end", list(range(x.rank - 1, start, -1)))
    form = b.pick("f", ("flatten", "reshape", "view"))
    if form == "flatten":
        return f"{x}.flatten({start}, {end})"
    sizes = [f"{x}.shape[0]", *map(str, x.dims)]
    merged = "-1" if start == 0 else str(int(_product(x.shape[start : end + 1])))
    sizes[start : end + 1] = [merged]
    return f"{x}{'.contiguous().view' if form == 'view' else '.reshape'}({', '.join(sizes)})"


def _product(numbers: tuple[int, ...]) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result


@op("view, permute", 2)
def unflatten(b: Frame) -> str:
    """Part a dimension in two (the batch where it is a multiple)."""
    x = b.take(accept=lambda t: t.rank <= 5 and (t.times > 1 or any(n > 1 for n in t.dims)))
    dims = [d for d in range(1, x.rank) if len(divisors(x.shape[d])) > 2] + ([0] if x.times > 1 else [])
    dim = b.pick("dim", dims)
    if dim == 0:
        return f"{x}.unflatten(0, (-1, {x.times}))"
    first = b.pick("first", divisors(x.shape[dim])[1:])
    sizes = (first, x.shape[dim] // first)
    form = b.pick("f", ("unflatten", "reshape", "view"))
    if form == "unflatten":
        return f"{x}.unflatten({dim}, {sizes})"
    whole = ["-1", *map(str, x.dims)]
    whole[dim : dim + 1] = map(str, sizes)
    return f"{x}{'.reshape' if form == 'reshape' else '.contiguous().view'}({', '.join(whole)})"


@op("view, permute")
def regroup(b: Frame) -> str:
    """A reshape that crosses dimensions: the channels do not stay channels."""
    x = b.take(accept=lambda t: t.rank >= 3)
    n = x.size
    first = b.pick("first", [d for d in divisors(n) if d <= 24])
    return f"{x}.reshape({x}.shape[0], {first}, {n // first})"


@op("view, permute")
def squeeze(b: Frame) -> str:
    """Add or drop a dimension of one."""
    x = b.take(accept=lambda t: t.rank <= 5)
    single = [d for d in range(1, x.rank) if x.shape[d] == 1]
    if single and b.flag("drop"):
        return f"{x}.squeeze({b.pick('dim', single)})"
    return f"{x}.unsqueeze({b.pick('dim', list(range(1, x.rank + 1)))})"


@op("chunk, slice, index", 2)
def parts(b: Frame) -> list[str]:
    """chunk, split, unbind: several pieces of a tensor, one of them perhaps unused."""
    x = b.take()
    dim = _axis(b, x)
    n = x.shape[dim]
    form = b.pick("f", ("chunk", "split", "split_list", "unbind", "tensor_split", "one"))
    if form == "one":
        return b.unpack(
            f"{x}{b.pick('whole', (f'.split([{n}], {dim})', f'.chunk(1, {dim})', f'.split({n}, {dim})'))}", 1
        )
    b.need(n >= 2)
    if form == "chunk":
        return b.unpack(f"{x}.chunk(2, dim={dim})", 2)
    if form == "split":
        size = b.pick("size", list(range((n + 1) // 2, n)) or [1])
        return b.unpack(f"torch.split({x}, {size}, {dim})", -(-n // size))
    if form == "split_list":
        first = b.pick("first", list(range(1, n)))
        return b.unpack(f"{x}.split([{first}, {n - first}], dim={dim})", 2)
    if form == "unbind":
        b.need(n <= 6 and x.rank >= 3)
        return b.unpack(f"{x}.unbind({dim})", n)
    return b.unpack(f"torch.tensor_split({x}, {min(3, n)}, dim={dim})", min(3, n))


@op("chunk, slice, index", 3)
def select(b: Frame) -> str:
    """A slice, a strided slice, a narrow, a picked index, a flip, a roll."""
    x = b.take()
    dim = _axis(b, x)
    n = x.shape[dim]
    form = b.pick(
        "f", ("slice", "stride", "narrow", "select", "list", "index_select", "flip", "roll", "pairs", "ellipsis")
    )
    start = b.pick("start", list(range(n)))
    stop = b.pick("stop", list(range(n, start, -1)))
    if form == "slice":
        return f"{x}{_at(x.rank, dim, f'{start}:{stop}')}"
    if form == "pairs":  # an index on two dimensions at once
        b.need(x.rank >= 3 and dim < x.rank - 1)
        both = list(range(min(n, x.shape[dim + 1])))[: b.pick("pairs", (3, 2))]
        return f"{x}{_at(x.rank, dim, str(both))[:-1]}, {both[::-1]}]"
    if form == "ellipsis":
        return f"{x}[..., {start % x.dims[-1]}:]"
    if form == "stride":
        return f"{x}{_at(x.rank, dim, f'{start % 2 if n > 1 else 0}::2')}"
    if form == "narrow":
        return f"{x}.narrow({dim}, {start}, {stop - start})"
    if form == "select":
        b.need(x.rank >= 3)
        return f"{x}{_at(x.rank, dim, str(start))}" if b.flag("index") else f"{x}.select({dim}, {start})"
    if form == "flip":
        return f"{x}.flip({dim})"
    if form == "roll":
        return f"{x}.roll({start or 1}, {dim})"
    order = [(start + 2 * i) % n for i in range(b.pick("count", list(range(1, n + 2))))]
    if form == "list":
        return f"{x}{_at(x.rank, dim, str(order))}"
    return f"{x}.index_select({dim}, {b.buffer(f'torch.tensor({order})')})"


@op("chunk, slice, index", 0.1)
def boolean_index(b: Frame) -> str:
    """An index by a boolean buffer: the size of the result depends on values."""
    x = b.take()
    dim = _axis(b, x)
    keep = [i % 3 != b.step.number % 3 for i in range(x.shape[dim])]
    b.need(any(keep))
    return f"{x}{_at(x.rank, dim, b.buffer(f'torch.tensor({keep})'))}"


@op("chunk, slice, index", 0.7)
def permute_channels(b: Frame) -> str:
    """A fixed random order of a dimension, by a buffer, gather or a one-hot matrix."""
    x = b.take()
    dim = _axis(b, x)
    n = x.shape[dim]
    order = sorted(range(n), key=lambda i: (7 * i + b.step.number) % (n + 1))
    form = b.pick("f", ("index", "take_along", "matrix"))
    index = b.buffer(f"torch.tensor({order})")
    if form == "index":
        return f"{x}{_at(x.rank, dim, index)}"
    if form == "matrix":
        return f"torch.movedim(torch.movedim({x}, {dim}, -1) @ torch.eye({n}, dtype={x}.dtype)[{index}], -1, {dim})"
    sizes = ["1"] * x.rank
    sizes[dim] = str(n)
    return f"torch.take_along_dim({x}, {index}.view({', '.join(sizes)}), dim={dim})"


@op("cat, stack", 3)
def cat(b: Frame) -> str:
    """Two or three tensors one after the other (a tensor twice at times)."""
    x = b.take()
    dim = _axis(b, x)

    def fits(t: T) -> bool:
        same = t.rank == x.rank and t.times == x.times
        return same and all(i == dim or n == x.shape[i] for i, n in enumerate(t.shape))

    parts_ = [x, b.take("y", fits)] + ([b.take("z", fits)] if b.flag("three") else [])
    if b.flag("turn"):
        parts_.reverse()
    total = sum(t.shape[dim] for t in parts_)
    b.need(total <= 24)
    return f"torch.cat([{', '.join(map(str, parts_))}], dim={dim})"


@op("cat, stack")
def stack(b: Frame) -> str:
    """Tensors of one shape along a new dimension, at times reduced again."""
    x = b.take(accept=lambda t: t.rank <= 5)
    y = b.take("y", lambda t: t.dims == x.dims and t.times == x.times)
    dim = b.pick("dim", list(range(1, x.rank + 1)))
    stacked = f"torch.stack([{x}, {y}], dim={dim})"
    return stacked + str(
        b.pick("then", ("", f".flatten({dim}, {min(dim + 1, x.rank)})", f".sum({dim})", f".amax({dim})"))
    )


@op("expand, repeat", 1.5)
def repeat(b: Frame) -> str:
    """repeat, repeat_interleave, tile, expand: elements several times."""
    x = b.take(accept=lambda t: t.size <= 400)
    dim = _axis(b, x)
    form = b.pick("f", ("repeat_interleave", "repeat", "tile", "expand_new", "expand_one"))
    sizes = ["1"] * x.rank
    sizes[dim] = "2"
    if form == "repeat_interleave":
        return f"{x}.repeat_interleave({b.pick('times', (2, 3))}, dim={dim})"
    if form == "repeat":
        return f"{x}.repeat({', '.join(sizes)})"
    if form == "tile":
        return f"torch.tile({x}, ({', '.join(sizes)}))"
    if form == "expand_one":
        b.need(x.shape[dim] == 1)
        sizes = ["-1"] * x.rank
        sizes[dim] = str(b.pick("times", (2, 3)))
        return f"{x}.expand({', '.join(sizes)})"
    b.need(x.rank <= 5)
    wide = ["-1"] * (x.rank + 1)
    wide[dim] = str(b.pick("times", (2, 3)))
    code = f"{x}.unsqueeze({dim}).expand({', '.join(wide)})"
    return code if b.flag("keep") else f"{code}.reshape({_reshaped(x, dim, int(wide[dim]))})"


def _reshaped(x: T, dim: int, times: int) -> str:
    sizes = ["-1", *map(str, x.dims)]
    sizes[dim] = str(x.shape[dim] * times)
    return ", ".join(sizes)


@op("pixel shuffle")
def pixel_shuffle(b: Frame) -> str:
    """Space to depth and back, as an operator and by hand."""
    x = b.take(accept=plane)
    c, h, w = x.dims
    form = b.pick("f", ("down", "up", "up_hand", "down_slices", "module"))
    if form in ("up", "module"):
        b.need(c % 4 == 0)
        return f"F.pixel_shuffle({x}, 2)" if form == "up" else f"{b.module('nn.PixelShuffle(2)')}({x})"
    if form == "up_hand":
        b.need(c % 4 == 0)
        return (
            f"{x}.view(-1, {c // 4}, 2, 2, {h}, {w}).permute(0, 1, 4, 2, 5, 3).reshape(-1, {c // 4}, {2 * h}, {2 * w})"
        )
    b.need(h % 2 == 0 and w % 2 == 0)
    if form == "down":
        return f"F.pixel_unshuffle({x}, 2)"
    return f"torch.cat([{x}[..., ::2, ::2], {x}[..., 1::2, ::2], {x}[..., ::2, 1::2], {x}[..., 1::2, 1::2]], 1)"


@op("channel shuffle", 1.5)
def channel_shuffle(b: Frame) -> str:
    """A channel shuffle in its spellings."""
    x = b.take(accept=lambda t: image(t) and len(divisors(t.dims[0])) > 2)
    c = x.dims[0]
    groups = b.pick("groups", divisors(c)[1:-1])
    per, rest = c // groups, ", ".join(map(str, x.dims[1:]))
    form = b.pick("f", ("view", "unflatten", "stack", "module", "last"))
    if form == "view":
        return f"{x}.reshape(-1, {groups}, {per}, {rest}).transpose(1, 2).reshape(-1, {c}, {rest})"
    if form == "unflatten":
        return f"{x}.unflatten(1, ({groups}, {per})).transpose(2, 1).flatten(1, 2)"
    if form == "stack":
        return f"torch.stack(torch.chunk({x}, {groups}, 1), 2).flatten(1, 2)"
    if form == "module":
        return f"{b.module(f'nn.ChannelShuffle({groups})')}({x})"
    last = x.dims[-1]
    b.need(len(divisors(last)) > 2)
    g = divisors(last)[1]
    return f"{x}.unflatten(-1, ({g}, {last // g})).transpose(-1, -2).flatten(-2)"


@op("in place", 2)
def write(b: Frame) -> str:
    """Writes into a tensor or into a view of it."""
    x = b.take(accept=lambda t: t.rank >= 2)
    dim = _axis(b, x)
    n = x.shape[dim]
    start = b.pick("start", list(range(n)))
    place = _at(x.rank, dim, f"{start}:{b.pick('stop', list(range(n, start, -1)))}")
    form = b.pick(
        "f",
        ("clone_set", "fill", "add_view", "relu_", "add_", "mul_", "copy_", "iadd_slice", "zeros", "select", "masked"),
    )
    if form == "zeros":
        own = b.let(f"torch.zeros_like({x})")
        b.line(f"{own}{place} = {x}{place}")
        return own
    if form == "clone_set" or b.flag("clone"):
        own = b.let(f"{x}.clone()")
    else:
        own = str(x)
        b.writing(x)
    lines = {
        "clone_set": f"{own}{place} = {x}{place} * 2",
        "fill": f"{own}{place}.fill_(0.3)",
        "add_view": f"{own}{place}.add_(0.5)",
        "relu_": f"{own}.relu_()",
        "add_": f"{own}.add_({x} * 0.5)",
        "mul_": f"{own}.mul_(torch.sigmoid({x}))",
        "copy_": f"{own}{place}.copy_({x}{place} * 0.5)",
        "iadd_slice": f"{own}{place} += torch.tanh({x}{place})",
        "select": f"{own}.select({dim}, {start}).mul_(0.5)",
        "masked": f"{own}[{own} > 0.017] = 0.2",
    }
    b.line(lines[form])
    name = f"v{b.step.number}"
    b.line(f"{name} = {own}")
    return [name]
