"""Attend over whole tiles with four heads as rows: the loop, and its scores. See `gpu_lanes.py`.

Blocks of the next tile are loaded as soon as those of this one are unpacked, keys before the
weights and values at the end, and the pages that the tile behind it lies in are looked up then: so
no load is waited for where it is issued, and no register is moved.

The largest score of a head is kept as a whole number of powers of two, which is what it is rounded
up to in any case: the maximum of integers over the lanes takes one instruction a step.
"""

from __future__ import annotations

from ..ir.halves import TILE
from ..ir.plan import AttentionPlan, StreamPlan
from ..ir.planes import code_bits, offset
from .gpu_blocks import block_bytes
from .gpu_lane_values import fetched_values, write_partials, write_sums, write_values, write_weights
from .gpu_lanes import Keys, Row, Stored, keys_of, scale_in, values_of
from .gpu_pages import declare_pages
from .gpu_prepare import declare_codes
from .gpu_scales import affine, has_zero, per_channel
from .gpu_text import LOG2_E, Kernel, across, both, load, padded, write_softcap

LEAST_ROWS = 4
LEAST = -(2**30)
"""A power of two below that of any score."""

HELPERS = '''

@triton.jit
def in_bytes(x):
    """Two bytes of each half-word, [N, K] -> [N, 2 K]."""
    pairs = tl.join(x.to(tl.int8), (x >> 8).to(tl.int8))
    return tl.reshape(pairs, (x.shape[0], 2 * x.shape[1]))


@triton.jit
def in_line(x, y):
    """x and then y, [N, K] -> [N, 2 K]."""
    both = tl.permute(tl.join(x, y), (0, 2, 1))
    return tl.reshape(both, (x.shape[0], 2 * x.shape[1]))


@triton.jit
def by_turns(even, odd):
    """Numbers 0, 2, 1, 3 of each four, from the even and the odd ones."""
    fours = tl.reshape(tl.join(even, odd), (even.shape[0], even.shape[1] // 2, 2, 2))
    return tl.reshape(tl.permute(fours, (0, 1, 3, 2)), (even.shape[0], 2 * even.shape[1]))


@triton.jit
def in_turn(x):
    """Numbers 0, 2, 1, 3 of each four."""
    fours = tl.reshape(x, (x.shape[0], x.shape[1] // 4, 2, 2))
    return tl.reshape(tl.permute(fours, (0, 1, 3, 2)), (x.shape[0], x.shape[1]))
'''


def sequences_text(plan: AttentionPlan, *, plain: bool) -> str:
    """Return the functions that the kernel calls."""
    found = {one.sequence for part in keys_of(plan) for one in part.unpacked}
    found |= {part.sequence for part in values_of(plan.v)}
    texts = (one.source(plain=plain) for one in sorted(found, key=lambda one: one.name))
    return "".join(texts) + HELPERS


def declare_lanes(kernel: Kernel, plan: AttentionPlan) -> None:
    """Declare what the whole tiles are read from."""
    for stream in (plan.k, plan.v):
        declare_pages(kernel, stream)
        for dtype in ("int16", "int32"):
            kernel.array(f"{stream.role}_{dtype}", dtype)
    kernel.scalar("splits")
    declare_codes(kernel, plan)


def write_wide_split(kernel: Kernel, plan: AttentionPlan) -> None:
    """Attend to the whole tiles [first, last) of one split."""
    k, v, rows = keys_of(plan), values_of(plan.v), padded(plan.group, LEAST_ROWS)
    kernel.line(f"row = tl.arange(0, {rows})")
    kernel.line(f"exists = row < {plan.group}")
    kernel.line(f"t = tl.arange(0, {TILE})")
    _write_queries(kernel, plan, k)
    kernel.note("sums: the largest score in powers of two, the denominator, the outputs")
    kernel.line(f"best = tl.full(({rows},), {LEAST}, tl.int32)")
    kernel.line(f"total = tl.zeros(({rows}, {TILE}), tl.float32)")
    write_sums(kernel, v, rows)
    kernel.note("the first tile, and the pages of the second")
    kernel.line(f"newest = last * {TILE} - {TILE}")
    own = ((plan.k, _fetched_keys(plan, k)), (plan.v, fetched_values(v)))
    for stream, fetched in own:
        _write_page(kernel, stream, f"first * {TILE}")
        _write_fetch(kernel, stream, fetched, f"first * {TILE}")
        _write_page(kernel, stream, f"tl.minimum(first * {TILE} + {TILE}, newest)")
    # The loop is in order as it is: nothing is left to the compiler's pipeline.
    loop = f"range(first * {TILE}, last * {TILE}, {TILE}, num_stages=1)"
    with kernel.block(f"for place in tl.{loop}"):
        kernel.line(f"then = tl.minimum(place + {TILE}, newest)")
        kernel.line(f"later = tl.minimum(place + {2 * TILE}, newest)")
        for stream, fetched in own:
            kernel.note("keys" if stream.role == "k" else "values")
            if stream.role == "k":
                _write_scores(kernel, plan, k)
            else:
                write_weights(kernel, plan, v)
                write_values(kernel, v)
            _write_fetch(kernel, stream, fetched, "then")
            _write_page(kernel, stream, "later")
    write_partials(kernel, plan, v)


def _write_page(kernel: Kernel, stream: StreamPlan, place: str) -> None:
    role, size = stream.role, stream.page_tokens
    at = f"({place}) // {size}"
    page = f"tl.load({role}_table + b * {role}_max_pages + {at})"
    # NOTE: a product of 64 bits with what is known to have 32 is half as long.
    kernel.line(f"{role}_page = {page}.to(tl.int32)")


def _write_fetch(
    kernel: Kernel, stream: StreamPlan, fetched: list[tuple[str, str]], place: str
) -> None:
    """Load a tile at a place of its page."""
    role, layout = stream.role, stream.page_layout()
    page = f"{role}_page.to(tl.int64)"
    kernel.line(f"{role}_block = {page} * {layout.page_bytes} + h * {layout.head_bytes}")
    if stream.page_tokens != TILE:
        kernel.line(f"{role}_in = ({place}) % {stream.page_tokens}")
    for name, text in fetched:
        kernel.line(f"{name} = {text}")


def _inside(stream: StreamPlan) -> str:
    """Return the name of the first token's number in its page, or "" where it is 0."""
    return "" if stream.page_tokens == TILE else f"{stream.role}_in"


def _fetched_keys(plan: AttentionPlan, k: tuple[Keys, ...]) -> list[tuple[str, str]]:
    """Return (name, load) of all that a tile of keys is."""
    found, inside = [], _inside(plan.k)
    for part in k:
        found += [(row.name, _load_rows(part, row, inside)) for row in part.rows]
        if per_channel(part.reader):
            found += _channel_words(part)
            continue
        found += [(one.name, one.load(inside)) for one in _stored(part)]
    return found


def _stored(part: Keys) -> list[Stored]:
    """Return what each token has besides its codes."""
    reader = part.reader
    zeros = [Stored(reader, "zero", scale) for scale in part.all_scales] if has_zero(reader) else []
    return [*(scale_in(reader, scale) for scale in part.all_scales), *zeros]


def _load_rows(part: Keys, row: Row, inside: str) -> str:
    """Return the load of rows of a tile: half-words of each token, [tokens, row / 2]."""
    portions = f"tl.arange(0, {part.portions})"
    last = part.row // 2 // part.portion - 1
    portions = portions if last + 1 == part.portions else f"tl.minimum({portions}, {last})"
    token = f"({inside} + t)" if inside else "t"
    field = part.reader.part.field(row.field)
    offset = (field.offset + row.first) // 2
    at = f"k_int16 + k_block // 2 + {offset} + {token}[None, :, None] * {field.shape[1] // 2}"
    at += f" + {portions}[:, None, None] * {part.portion}"
    at += f" + tl.arange(0, {part.portion})[None, None, :]"
    shape = f"({TILE}, {part.wide // 2})"
    return f"tl.reshape(tl.permute(tl.load({at}), (1, 0, 2)), {shape})"


def _halves_of_tile(part: Keys) -> range:
    """Return the numbers of the portions of a tile that have scales of channels of their own."""
    return range(1 if part.reader.coded().group_tokens % TILE == 0 else 2)


def _channel_words(part: Keys) -> list[tuple[str, str]]:
    """Return (name, load) of scales and zero points of channels, two f16 in a word."""
    reader, found = part.reader, []
    names = ("scale", "zero") if has_zero(reader) else ("scale",)
    group, columns = reader.coded().group_tokens, reader.part.width // 2
    for name in names:
        field = reader.part.field(name)
        for i in _halves_of_tile(part):
            row = ""
            if field.shape[0] > 1:
                inside = _inside(reader.stream)
                place = f"({inside} + {TILE // 2 * i})" if inside else str(TILE // 2 * i)
                row = f" + {place} // {group} * {columns}"
            for product in part.products:
                word = f"{part.name}_w{product}"
                at = f"k_int32 + k_block // 4 + {field.offset // 4}{row} + {word}"
                found.append((_word(part, name, product, i), f"tl.load({at})[None, :]"))
    return found


def _word(part: Keys, name: str, product: int, i: int) -> str:
    return f"{part.name}_{name}s_{product}_{i}"


def _write_queries(kernel: Kernel, plan: AttentionPlan, k: tuple[Keys, ...]) -> None:
    """Bind the queries of each product, [R, terms], and `factor`: scores as powers of two."""
    kernel.note("the queries as products take them, and what one is worth")
    step = load("query_step + bh * rows + row", "exists")
    kernel.line(f"factor = {step}" + ("" if plan.softcap is not None else f" * {LOG2_E}"))
    sums: set[str] = set()
    for part in k:
        for product in part.products:
            if plan.query_bits is None:
                _write_pairs(kernel, plan, part, product)
                continue
            for scale in part.scales(product):
                _write_bytes(kernel, plan, part, product, scale)
                name = f"{part.name}_sum_{scale}"
                more = f"{name} + " if name in sums else ""
                kernel.line(f"{name} = {more}tl.sum(q, axis=1)")
                sums.add(name)


def _write_bytes(kernel: Kernel, plan: AttentionPlan, part: Keys, product: int, scale: int) -> None:
    """Bind the integers of the queries of a product: `q`, and as bytes, one or two."""
    inside = both(part.inside(product), part.scale_is(product, scale))
    name = f"{part.name}_q{product}_{scale}"
    kernel.line(f"q = {_query(plan, part.channels(product), inside, 'query_codes')}.to(tl.int32)")
    if plan.query_bits == 8:
        kernel.line(f"{name}_n = q.to(tl.int8)")
        return
    kernel.line("q_high = (q + 128) >> 8")
    kernel.line(f"{name}_high = q_high.to(tl.int8)")
    kernel.line(f"{name}_low = (q - (q_high << 8)).to(tl.int8)")


def _query(plan: AttentionPlan, channels: str, inside: str, array: str) -> str:
    """Return the load of the queries of some channels, [R, channels]."""
    at = f"{array} + (bh * rows + row)[:, None] * {plan.k.channels} + {across(f'({channels})')}"
    return load(at, both("exists[:, None]", across(f"({inside})") if inside else ""))


def _write_pairs(kernel: Kernel, plan: AttentionPlan, part: Keys, product: int) -> None:
    """Bind the even and the odd queries of a product, and where their scales are.

    Twice: lowered by the place of a code in its byte, even ones before odd ones in a block as
    `gpu_prepare.py` stores them; and as they are, for zero points.
    """
    name, first = f"{part.name}_q{product}", part.reader.part.first
    # Rows are whole half-words, so both channels of a word are inside or neither is.
    k = f"tl.arange(0, {part.terms})"
    inside = part.inside(product).replace(k, f"2 * tl.arange(0, {part.terms // 2})")
    width = block_bytes(part.reader.part)
    kernel.line(f"channel = {part.channels(product, 2)}")
    less = f"(channel - {first})" if first else "channel"
    kernel.line(f"column = {less} % {width}")
    for parity in (0, 1):
        stored = "channel - column + column // 2" + (f" + {width // 2}" if parity else "")
        kernel.line(f"{name}_{parity} = {_query(plan, stored, inside, 'query_codes')}")
        if affine(part.reader).zero == "float":
            channel = "channel" + (" + 1" if parity else "")
            exact = f"{_query(plan, channel, inside, 'query_halves')}.to(tl.float32)"
            kernel.line(f"{name}_{parity}_exact = {exact}")
    most = part.reader.part.width // 2 - 1
    kernel.line(f"{part.name}_w{product} = tl.minimum({less} // 2, {most})")


def _write_scores(kernel: Kernel, plan: AttentionPlan, k: tuple[Keys, ...]) -> None:
    """Bind `score`, f32 [R, N], which `factor` makes powers of two."""
    for number, part in enumerate(k):
        _write_unpacked(kernel, part)
        if per_channel(part.reader):
            _write_channel_scores(kernel, part)
        else:
            _write_token_scores(kernel, plan, part)
        kernel.line(f"score {'+=' if number else '='} part")
    if plan.softcap is not None:
        kernel.line("score = score * factor[:, None]")
        write_softcap(kernel, plan.softcap)
    factor = str(LOG2_E) if plan.softcap is not None else "factor[:, None]"
    kernel.line(f"score = score * {factor}")


def _write_unpacked(kernel: Kernel, part: Keys) -> None:
    """Bind <part>_k<product>, the operands of the products, [terms, N]."""
    kinds = ("bytes",) if part.is_exact else ("even", "odd")
    for one in part.unpacked:
        names = [f"{part.name}_{kind}_{i}" for kind in kinds for i in one.planes]
        kernel.line(f"{', '.join(names)} = {one.sequence.name}({one.operands})")
    for product in part.products:
        text = ""
        for i in part.planes(product):
            plane = f"by_turns({part.name}_even_{i}, {part.name}_odd_{i})"
            if part.is_exact:
                plane = f"in_bytes({part.name}_bytes_{i})"
            kernel.line(f"plane_{i} = {plane}")
        names = [f"plane_{i}" for i in part.planes(product)]
        while len(names) > 1:
            names = [f"in_line({a}, {b})" for a, b in zip(names[::2], names[1::2], strict=True)]
        text = names[0]
        kernel.line(f"{part.name}_k{product} = tl.trans({text})")


def _write_token_scores(kernel: Kernel, plan: AttentionPlan, part: Keys) -> None:
    """Bind `part`: products with integers of q, exactly; scale and zero point go on the score."""
    reader, fmt = part.reader, part.reader.coded()
    middle = offset(fmt) if not has_zero(reader) else 0
    # Bytes of whole codes are counted from 128.
    less = middle - (128 if code_bits(fmt) == 8 else 0)
    for number, scale in enumerate(part.all_scales):
        total = f"{part.name}_sum_{scale}[:, None]"
        if plan.query_bits == 16:
            # NOTE: the compiler would begin one sum with the other, and its products would wait.
            kernel.line(f"n = {_dots(part, scale, 'low')}")
            kernel.line(f"n -= {_dots(part, scale, 'high')} * -256")
        else:
            kernel.line(f"n = {_dots(part, scale, 'n')}")
        if less:
            kernel.line(f"n -= {less} * {total}")
        kernel.line("n = n.to(tl.float32)")
        kernel.line(f"scale = {scale_in(reader, scale).number}")
        share = "n * scale[None, :]"
        if has_zero(reader):
            kernel.line(f"zero = {Stored(reader, 'zero', scale).number}")
            zero = f"zero[None, :] * {total}.to(tl.float32)"
            is_int = affine(reader).zero == "int"
            share = f"(n - {zero}) * scale[None, :]" if is_int else f"{share} + {zero}"
        kernel.line(f"part {'+=' if number else '='} {share}")


def _dots(part: Keys, scale: int, kind: str) -> str:
    """Return the products of the channels with a scale, i32 [R, N]."""
    text = ""
    for product in part.products:
        if scale in part.scales(product):
            more = f", {text}" if text else ""
            query, keys = f"{part.name}_q{product}_{scale}_{kind}", f"{part.name}_k{product}"
            text = f"tl.dot({query}, {keys}{more}, out_dtype=tl.int32)"
    return text


def _write_channel_scores(kernel: Kernel, part: Keys) -> None:
    """Bind `part`: scales and zero points of channels go on the queries, once a tile."""
    kernel.note("scales of channels, two neighbours in a word, go on the queries")
    for i in _halves_of_tile(part):
        text, beside = "", ""
        for product in part.products:
            _write_scaled(kernel, part, product, i)
            more = f", {text}" if text else ""
            text = f"tl.dot(y_{product}, {part.name}_k{product}{more}, out_dtype=tl.float32)"
            beside = f"{beside} + beside_{product}" if beside else f"beside_{product}"
        kernel.line(f"half_{i} = {text} * {2.0**24!r} + tl.sum({beside}, axis=1)[:, None]")
    whole = len(_halves_of_tile(part)) == 1
    picked = "half_0" if whole else f"tl.where((t < {TILE // 2})[None, :], half_0, half_1)"
    kernel.line(f"part = {picked}")


def _write_scaled(kernel: Kernel, part: Keys, product: int, i: int) -> None:
    """Bind y, the scaled queries of a product in float16, and `beside`: what codes of 0 give."""
    fmt, q = affine(part.reader), f"{part.name}_q{product}"
    terms = []
    for parity in (0, 1):
        for name in ("scale", "zero") if has_zero(part.reader) else ("scale",):
            word = _word(part, name, product, i)
            bits = f"({word} >> 16)" if parity else word
            half = f"{bits}.to(tl.int16).to(tl.float16, bitcast=True)"
            kernel.line(f"{name}_{parity} = {half}")
        kernel.line(f"scaled_{parity} = {q}_{parity} * scale_{parity}")
        if fmt.zero == "float":
            terms.append(f"{q}_{parity}_exact * zero_{parity}.to(tl.float32)")
        else:
            zero = str(float(offset(fmt)))
            zero = f"zero_{parity}.to(tl.float32)" if fmt.zero == "int" else zero
            kernel.line(f"less_{parity} = scaled_{parity}.to(tl.float32) * {zero}")
            terms.append(f"less_{parity}")
    kernel.line(f"y_{product} = by_turns(scaled_0, scaled_1)")
    text = " + ".join(terms)
    if fmt.zero != "float":
        raised = part.raised(product, 2)
        text = f"-({text})" + (f" * {raised}" if raised else "")
    kernel.line(f"beside_{product} = {text}")
