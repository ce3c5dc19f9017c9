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


@dataclass(frozen=True, slots=True)
class Cpu:
    """A kind of processor.

    Attributes:
        name: as a user writes it after "cpu:", "x86-64-v3".
        triple: LLVM's name of processor, system and C library.
        mcpu: LLVM's name of the processor.
        system: as platform.system() says.
        machine: as platform.machine() says.
        features: what a machine must have, spelled as /proc/cpuinfo does; none for macOS, where the
            name says all.
        vector: bytes of a vector register.
        dots: how integers are multiplied and summed: "pairs" (pmaddubsw and pmaddwd), "vnni"
            (vpdpbusd, vpdpwssd), "neon" (sdot), "neon-i8mm" (usdot).
        fma: whether a product and a sum are one instruction.
        summary: what has it, for people.
    """

    name: str
    triple: str
    mcpu: str
    system: str
    machine: str
    features: tuple[str, ...]
    vector: int
    dots: str
    fma: bool
    summary: str


# The levels: x86-64 psABI, table "Micro-Architecture Levels". What a level adds to the one below.
V2 = ("cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3")
V3 = (*V2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave")
V4 = (*V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# Processors: LLVM's lists (X86.td, AArch64Processors.td), without what only intrinsics, ciphers
# or operating systems use: no arithmetic becomes those.
ALDERLAKE = (*V3, "avx_vnni", "gfni")
AVX512_VNNI = ("avx512_bitalg", "avx512_vbmi2", "avx512_vnni", "avx512_vpopcntdq", "avx512ifma")
ZNVER4 = (*V4, *AVX512_VNNI, "avx512_bf16", "avx512vbmi", "gfni")
SAPPHIRERAPIDS = (*ZNVER4, "avx512_fp16", "avx_vnni")
NEOVERSE_V2 = (
    *("asimd", "asimddp", "asimdfhm", "asimdhp", "asimdrdm", "atomics", "bf16", "fcma", "fphp"),
    *("i8mm", "jscvt", "lrcpc", "sve", "sve2"),
)


def _x86(
    name: str, features: tuple[str, ...], vector: int, dots: str, devices: str, fma: bool = True
) -> Cpu:
    summary = f"{devices}, by TVM"
    place = ("x86_64-linux-gnu", name, "Linux", "x86_64")
    return Cpu(name, *place, features, vector, dots, fma, summary)


# Best first of those that a machine may run. Vectors and instructions: Intel and AMD optimization
# guides; Arm, Neoverse V2 technical reference (SVE is 128 bits wide there); Apple M1: Armv8.4-A,
# which has the dot products of bytes but not i8mm (LLVM's AArch64Processors.td).
CPUS = {
    cpu.name: cpu
    for cpu in (
        _x86("sapphirerapids", SAPPHIRERAPIDS, 64, "vnni", "Xeon Scalable 4 and newer"),
        _x86("znver4", ZNVER4, 64, "vnni", "Zen 4 and newer"),
        _x86("x86-64-v4", V4, 64, "pairs", "x86-64 with AVX-512"),
        _x86("alderlake", ALDERLAKE, 32, "vnni", "x86-64 with AVX2 and AVX-VNNI"),
        _x86("x86-64-v3", V3, 32, "pairs", "x86-64 with AVX2 and FMA"),
        _x86("x86-64-v2", V2, 16, "pairs", "x86-64 with SSE 4.2", fma=False),
        Cpu(
            name="neoverse-v2",
            triple="aarch64-linux-gnu",
            mcpu="neoverse-v2",
            system="Linux",
            machine="aarch64",
            features=NEOVERSE_V2,
            vector=16,
            dots="neon-i8mm",
            fma=True,
            summary="Graviton 4, Grace, Axion, by TVM and zig; compiled and inspected, never run",
        ),
        Cpu(
            name="apple-m1",
            triple="arm64-apple-macos",
            mcpu="apple-a14",  # its cores, as LLVM calls them
            system="Darwin",
            machine="arm64",
            features=(),
            vector=16,
            dots="neon",
            fma=True,
            summary="Apple silicon: object file and assembly alone, no library to load",
        ),
    )
}
