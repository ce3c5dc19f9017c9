"""Attention over a 4-bit cache as public code in Triton writes it: a peer, and no part of kvant.

Two codes a byte, of channels 2 j and 2 j + 1; scale and zero point of each token and head in f16. A
tile is unpacked and dequantized to float16 in registers, then multiplied; the splits of a row are
merged by a second kernel. That is how kernels look that grew from a 16-bit one. Nothing here is
tuned by hand, nor made slow on purpose.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

TILE, LEAST_ROWS, WARPS = 64, 16, 4
SPLIT_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Packed:
    """A cache.

    Attributes:
        codes: uint8[B, H, T, D / 2].
        scale: f16[B, H, T].
        zero: f16[B, H, T].
    """

    codes: Any
    scale: Any
    zero: Any


def pack(x: Any) -> Packed:
    """Return x [B, H, T, D] in four bits, with a scale and a zero point of each token and head."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-6).half()
    low = low.half()
    codes = ((x - low) / scale).round().clamp(0, 15).to(torch.uint8)
    packed = codes[..., 0::2] | codes[..., 1::2] << 4
    return Packed(packed.contiguous(), scale[..., 0].contiguous(), low[..., 0].contiguous())


def unpack(packed: Packed) -> Any:
    """Return what is stored, f32 [B, H, T, D]."""
    codes = torch.stack((packed.codes & 15, packed.codes >> 4), -1).flatten(-2).float()
    return codes * packed.scale.float()[..., None] + packed.zero.float()[..., None]


@triton.jit
def unpacked(codes, scale, zero, at, t, here, D: tl.constexpr):
    """Return a tile in float16, [N, D]."""
    c = tl.arange(0, D // 2)
    byte = tl.load(codes + (at + t)[:, None] * (D // 2) + c[None, :], mask=here[:, None], other=0)
    low, high = (byte & 15).to(tl.float16), (byte >> 4).to(tl.float16)
    x = tl.join(low, high).reshape(t.shape[0], D)
    s = tl.load(scale + at + t, mask=here, other=0.0)
    z = tl.load(zero + at + t, mask=here, other=0.0)
    return x * s[:, None] + z[:, None]


@triton.jit
def split_kernel(
    q,
    k_codes,
    k_scale,
    k_zero,
    v_codes,
    v_scale,
    v_zero,
    part,
    part_lse,
    tokens,
    size,
    scale,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    N: tl.constexpr,
):
    """Attend the heads of one group to one split of the tokens."""
    bh = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    row, d, i = tl.arange(0, R), tl.arange(0, D), tl.arange(0, N)
    query = tl.load(q + (bh * G + row)[:, None] * D + d[None, :], mask=row[:, None] < G, other=0.0)
    best = tl.full((R,), float("-inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    out = tl.zeros((R, D), tl.float32)
    begin, at = split * size, bh * tokens
    for start in range(begin, tl.minimum(begin + size, tokens), N):
        t = start + i
        here = t < tokens
        k = unpacked(k_codes, k_scale, k_zero, at, t, here, D)
        score = tl.dot(query, tl.trans(k)) * scale
        score = tl.where(here[None, :], score, float("-inf"))
        most = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp(score - most[:, None])
        shrink = tl.exp(best - most)
        total = total * shrink + tl.sum(weight, axis=1)
        v = unpacked(v_codes, v_scale, v_zero, at, t, here, D)
        out = out * shrink[:, None] + tl.dot(weight.to(tl.float16), v)
        best = most
    place = (bh * tl.num_programs(1) + split) * G + row
    tl.store(part + place[:, None] * D + d[None, :], out / total[:, None], mask=row[:, None] < G)
    tl.store(part_lse + place, best + tl.log(total), mask=row < G)


@triton.jit
def merge_kernel(part, part_lse, out, splits, G: tl.constexpr, D: tl.constexpr):
    """Merge the splits of one head."""
    bh, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, D)
    best = tl.load(part_lse + bh * splits * G + g)
    for split in range(1, splits):
        best = tl.maximum(best, tl.load(part_lse + (bh * splits + split) * G + g))
    total = best * 0.0
    x = tl.zeros((D,), tl.float32)
    for split in range(0, splits):
        place = (bh * splits + split) * G + g
        weight = tl.exp(tl.load(part_lse + place) - best)
        total += weight
        x += weight * tl.load(part + place * D + d)
    tl.store(out + (bh * G + g) * D + d, (x / total).to(tl.float16))


@dataclass(frozen=True, slots=True)
class Int4:
    """One query a row over a packed cache, again and again.

    Attributes:
        q: f16[B, Hq, D].
        k: keys.
        v: values.
        part: f32[B, Hq, splits, D], results of each split.
        lse: f32[B, Hq, splits].
        out: f16[B, Hq, D].
        split_tokens: tokens of a split, whole tiles.
    """

    q: Any
    k: Packed
    v: Packed
    part: Any
    lse: Any
    out: Any
    split_tokens: int

    def __call__(self) -> Any:
        """Return the attention, [B, Hq, D]."""
        batch, heads, tokens, half = self.k.codes.shape
        group, splits = self.q.shape[1] // heads, -(-tokens // self.split_tokens)
        arrays = (x for p in (self.k, self.v) for x in (p.codes, p.scale, p.zero))
        split_kernel[(batch * heads, splits)](
            self.q,
            *arrays,
            self.part,
            self.lse,
            tokens,
            self.split_tokens,
            (2 * half) ** -0.5,
            G=group,
            R=max(LEAST_ROWS, triton.next_power_of_2(group)),
            D=2 * half,
            N=TILE,
            num_warps=WARPS,
        )
        merge_kernel[(batch * heads, group)](
            self.part, self.lse, self.out, splits, G=group, D=2 * half, num_warps=WARPS
        )
        return self.out


def new_int4(q: Any, k: Any, v: Any, split_tokens: int = SPLIT_TOKENS) -> Int4:
    """Return the peer for q f16[B, Hq, D] over k and v [B, H, T, D]."""
    splits = -(-k.shape[2] // split_tokens)
    batch, heads, width = q.shape
    part = torch.empty(batch, heads, splits, width, device=q.device)
    return Int4(q, pack(k), pack(v), part, part[..., 0].clone(), torch.empty_like(q), split_tokens)
