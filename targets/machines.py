"""Facts of the machines that kernels are made for, each with where it is from."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True, slots=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: as a user writes it after the backend, "sm_90".
        backend: "cuda" or "hip".
        arch: as Triton calls it: the compute capability as a number, or the name.
        warp: threads of a warp (or wavefront).
        shared: bytes of shared memory that one block may ask for.
        devices: what is called so, for people.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    devices: str


# Shared memory: CUDA C Programming Guide, table of technical specifications per compute capability,
# "Maximum amount of shared memory per thread block"; AMD: CDNA3 and CDNA4 ISA guides, LDS.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("sm_80", "cuda", 80, 32, 163 * KIB, "A100"),
        Gpu("sm_86", "cuda", 86, 32, 99 * KIB, "A10, A40, RTX 30"),
        Gpu("sm_89", "cuda", 89, 32, 99 * KIB, "L4, L40S, RTX 40"),
        Gpu("sm_90", "cuda", 90, 32, 227 * KIB, "H100, H200"),
        Gpu("sm_100", "cuda", 100, 32, 227 * KIB, "B200"),
        Gpu("sm_120", "cuda", 120, 32, 99 * KIB, "RTX 50"),
        Gpu("gfx942", "hip", "gfx942", 64, 64 * KIB, "MI300"),
        Gpu("gfx950", "hip", "gfx950", 64, 160 * KIB, "MI350"),
    )
}
