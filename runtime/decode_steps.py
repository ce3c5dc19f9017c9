"""Decode steps at fixed addresses, for CUDA graphs: `Cache.decode_steps`.

    steps = cache.decode_steps(512)         # room for 512 more tokens a row, made now
    steps.plan()                            # counts the next token, on the host
    with torch.cuda.graph(graph):           # launches alone: nothing of the host is captured
        for layer in range(layers):
            ...                             # k, v, q: [B, heads, 1, D], of this layer
            steps.append(layer, k, v)
            out = steps.attend(layer, q)
    graph.replay()
    while ...:
        steps.plan()
        graph.replay()

What a step launches, with which grids and addresses, is the same each time; how long rows are,
where their tails begin and which pages they have, it reads from memory that `plan` writes.
"""

from typing import TYPE_CHECKING, Any

from ..ir.errors import KvantError
from .bound import are_still
from .counts import most_waiting
from .decode import Decode
from .launch_gpu import Kernels
from .launch_step import made_of
from .launcher import refuse_capture
from .stream import Stream, page_limit, pages_before
from .tails import fix_tail
from .tensors import check_shape

if TYPE_CHECKING:
    from .cache import Cache


class DecodeSteps:
    """One new token a row and step, in every layer, by launches that a graph may replay.

    Made by `Cache.decode_steps`. The cache counts a token from `plan` on; what the step stores is
    there once it ran. A step may run any number of times before the next `plan` (to warm up, to be
    captured): it stores the same again. Other calls of the cache may only read in between; after
    one that changes it (append, flush, truncate, reorder), `plan` refuses.

    Attributes:
        cache: whose tokens these are.
        last: columns that the cache may have; then `plan` refuses.
    """

    def __init__(self, cache: "Cache", tokens: int) -> None:
        if not isinstance(cache.kernels, Kernels):
            raise KvantError(
                "not-on-a-device",
                f"the cache is on {cache.memory.device}, where nothing is captured",
                where="decode_steps",
                fix="use append and attend of the cache, or load the artifact with target='cuda'",
            )
        refuse_capture(cache.kernels.launcher, "memory is made for decode steps")
        columns = {layer.columns.length for layer in cache.layers}
        self.cache, self.last = cache, max(columns) + tokens
        if len(columns) > 1:
            raise _ended("the layers have different numbers of columns")
        if self.last > cache.max_tokens:
            raise KvantError(
                "cache-full",
                f"{tokens} more columns after {max(columns)} pass the limit of {cache.max_tokens}",
                where="decode_steps",
                fix="create the cache with a larger max_tokens, or ask for fewer tokens",
            )
        cache.flush()
        self._reserve(tokens)
        self._decode = Decode(
            cache.layers, cache.kernels, cache.max_tokens, cache.reserved, tokens=tokens
        )
        self._addresses = self._present()

    def plan(self) -> None:
        """Count the next token of every row, and send the counts on torch's current stream.

        It launches one small copy; where a page is taken, a second one; and rarely, where a tail is
        full, what moves its content to its front.

        Raises: KvantError "graph-capture" inside a capture; "cache-full" after as many tokens as
            were asked for; "steps-ended" if another call has changed the cache.
        """
        refuse_capture(self._decode.kernels.launcher, "a step is planned")
        if self.cache.layers[0].columns.length >= self.last:
            raise KvantError(
                "cache-full",
                f"the decode steps were made for {self.last} columns, and the cache has them",
                where="plan",
                fix="make new ones with cache.decode_steps, and capture again",
            )
        known = are_still(self._addresses, self._present()) and not self._decode.waiting
        known = known and self.cache.reserved == self._decode.reserved
        if not known or not self._decode.advance():
            raise _ended("another call has changed the cache since the last step")
        if not are_still(self._addresses, self._present()):
            raise _ended("a pool of pages had to grow, so that its addresses changed")
        for index in range(len(self.cache.layers)):
            self._decode.settle(index)

    def append(self, layer: int, k: object, v: object) -> None:
        """Store the planned token of a layer, and encode what is due. Only launches.

        Args:
            layer: index from 0.
            k: [B, H, 1, D], after RoPE; a tensor of the cache's device, f32, bf16 or f16.
            v: [B, H, 1, Dv].

        Raises: KvantError "not-planned", "unknown-layer", "wrong-type", "wrong-dtype",
            "wrong-device", "wrong-shape".
        """
        index = self._index(layer, "append")
        self._decode.launch_append(index, self._read(index, 0, k), self._read(index, 1, v))

    def attend(self, layer: int, q: object, return_lse: bool = False) -> Any:
        """Return attention of the planned token's queries over all that its row holds.

        Args:
            layer: index from 0.
            q: [B, Hq, 1, D], after RoPE; a tensor of the cache's device, f32, bf16 or f16.
            return_lse: also return the log of the sum of exponentials, f32[B, Hq, 1].

        Returns: [B, Hq, 1, Dv], of the dtype of q.
        Raises: as `append`.
        """
        index = self._index(layer, "attend")
        out, lse = self._decode.launch_attend(index, self._read(index, 2, q), return_lse)
        return (out, lse) if return_lse else out

    def _index(self, layer: int, call: str) -> int:
        self.cache.layer(layer, call)
        if not self._decode.is_planned:
            raise KvantError(
                "not-planned",
                f"{call} of a decode step before any was planned",
                where=f"layer {layer}, {call}",
                fix="call plan() once before each step",
            )
        return int(layer)

    def _read(self, index: int, what: int, value: object) -> Any:
        """Return one of k, v, q as the kernels take it."""
        x = self._decode.read(index, what, value)
        if x is not None:
            return x
        name = ("k", "v", "q")[what]
        x = self.cache.memory.read_tokens(name, value)
        check_shape(
            name, tuple(x.shape), self._decode.members[index].shapes[what], f"layer {index}"
        )
        return x

    def _present(self) -> tuple[object, ...]:
        """Return what lies at the addresses that launches have."""
        return tuple(x for layer in self.cache.layers for x in made_of(layer.streams, None))

    def _reserve(self, tokens: int) -> None:
        """Make tails and pools so large that they stay where they are."""
        wanted = dict.fromkeys(self.cache.pools, 0)
        for layer in self.cache.layers:
            for stream in layer.streams:
                fix_tail(stream, most_waiting(stream, self.cache.reserved))
                wanted[stream.plan.page_layout().page_bytes] += _pages(stream, tokens)
        for size, pool in self.cache.pools.items():
            pool.reserve(wanted[size])


def _pages(stream: Stream, tokens: int) -> int:
    """Return how many pages all rows of a stream take for some more tokens, at most."""
    more = 0
    have = pages_before(stream, stream.encoded) - pages_before(stream, stream.held)
    for length, pages in zip(stream.length.tolist(), have.tolist(), strict=True):
        more += max(0, page_limit(stream.plan, length + tokens, stream.window) - pages)
    return more


def _ended(why: str) -> KvantError:
    return KvantError(
        "steps-ended",
        why,
        where="decode_steps",
        fix="make new ones with cache.decode_steps, and capture again",
    )
