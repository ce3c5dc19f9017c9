"""The 16-bit kernel that instruction counts are compared with: attention over a cache of float16.

As straightforward as can be and as good as its form allows: whole tiles alone, no masks, keys and
values as they are stored, asynchronous copies, one product a tile. In two forms:

    rows      query heads are the sixteen rows of a matrix product, as FlashAttention's split kernel
              and most public decoding kernels have it
    tokens    tokens are the rows and query heads eight columns, as in our own kernels
"""

from kvant.ir.halves import TILE
from kvant.ir.plan import AttentionPlan
from kvant.targets.gpu_text import Kernel, padded
from kvant.targets.source import Source, split_tokens

FORMS = ("rows", "tokens")
HEAD = '"""A kernel of float16 to compare with, written by kvant."""\n\n'
HEAD += "import triton\nimport triton.language as tl\n"
ARRAYS = {
    "query": "float32",
    "k_table": "int64",
    "v_table": "int64",
    "k_float16": "float16",
    "v_float16": "float16",
    "part_out": "float32",
    "part_max": "float32",
    "part_sum": "float32",
}


def fp16_attend(plan: AttentionPlan, form: str, stages: int) -> Source[Kernel]:
    """Return the kernel attend of a plan of raw float16.

    Args:
        plan: keys and values in float16, no sink, no window.
        form: one of FORMS.
        stages: tiles on their way at once.
    """
    kernel = Kernel("attend", warps=1)
    for name, dtype in ARRAYS.items():
        kernel.array(name, dtype)
    for name in ("k_max_pages", "v_max_pages", "parts", "rows"):
        kernel.scalar(name)
    is_rows, d = form == "rows", plan.k.channels
    rows = padded(plan.group, 16 if is_rows else 8)
    # How vectors of queries, and of what they are multiplied with, lie in a block.
    own, other = ("[:, None]", "[None, :]") if is_rows else ("[None, :]", "[:, None]")
    _write_start(kernel, plan, rows)
    kernel.line(f"q = tl.load(query + (bh * rows + row){own} * {d} + c{other})")
    kernel.line("q = q.to(tl.float16)")
    for name, size in (("total", TILE), ("out", d)):
        shape = f"{rows}, {size}" if is_rows else f"{size}, {rows}"
        kernel.line(f"{name} = tl.zeros(({shape}), tl.float32)")
    axis = 1 if is_rows else 0
    with kernel.block(f"for tile in tl.range(first, last, num_stages={stages})"):
        _write_block(kernel, plan, "k", f"t[:, None] * {d} + c[None, :]")
        kernel.line(f"score = tl.dot({'q, tl.trans(k)' if is_rows else 'k, q'})")
        kernel.line(f"most = tl.maximum(best, tl.max(score, axis={axis}))")
        kernel.line(f"weight = tl.exp2(score - most{own})")
        kernel.line(f"shrink = tl.exp2(best - most){own}")
        kernel.line("best = most")
        kernel.line("total = total * shrink + weight")
        # The left operand is loaded turned around: `tl.trans` of it goes through registers.
        _write_block(kernel, plan, "v", f"t{own} * {d} + c{other}")
        product = "weight.to(tl.float16), v" if is_rows else "v, weight.to(tl.float16)"
        kernel.line(f"out = tl.dot({product}, out * shrink)")
    kernel.line("part = (bh * parts + split) * rows + row")
    kernel.line("tl.store(part_max + part, best)")
    kernel.line(f"tl.store(part_sum + part, tl.sum(total, axis={axis}))")
    kernel.line(f"tl.store(part_out + part{own} * {d} + c{other}, out)")
    return Source(plan, (kernel,), HEAD)


def _write_start(kernel: Kernel, plan: AttentionPlan, rows: int) -> None:
    kernel.line("bh = tl.program_id(0).to(tl.int64)")
    kernel.line(f"b = bh // {plan.k.heads}")
    kernel.line(f"h = bh % {plan.k.heads}")
    kernel.line("split = tl.program_id(1)")
    kernel.line(f"row = tl.arange(0, {rows})")
    kernel.line(f"c = tl.arange(0, {padded(plan.k.channels)})")
    kernel.line(f"t = tl.arange(0, {TILE})")
    kernel.line(f'best = tl.full(({rows},), float("-inf"), tl.float32)')
    tiles = split_tokens(plan) // TILE
    kernel.line(f"first = split * {tiles}")
    kernel.line(f"last = first + {tiles}")


def _write_block(kernel: Kernel, plan: AttentionPlan, role: str, at: str) -> None:
    """Load a tile; `at` is where an element of a head block lies."""
    layout = (plan.k if role == "k" else plan.v).page_layout()
    size = layout.tokens // TILE
    page = "tile" if size == 1 else f"tile // {size}"
    inside = "" if size == 1 else f" + tile % {size} * {TILE * layout.channels}"
    kernel.line(f"page = tl.load({role}_table + b * {role}_max_pages + {page})")
    block = f"page * {layout.page_bytes // 2} + h * {layout.head_bytes // 2}{inside}"
    kernel.line(f"{role} = tl.load({role}_float16 + {block} + {at})")
