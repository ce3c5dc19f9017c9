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
        shared_per_sm: bytes that all blocks of a multiprocessor (or compute unit) have together.
        warps: that a multiprocessor holds at once.
        blocks: that a multiprocessor holds at once.
        registers: of a multiprocessor, 32 bits each.
        float_max: whether a warp finds its largest float32 in one instruction, as it does integers.
    """

    name: str
    backend: str
    arch: int | str
    warp: int
    shared: int
    devices: str
    shared_per_sm: int
    warps: int
    blocks: int
    registers: int
    float_max: bool = False


# CUDA C Programming Guide, tables of technical specifications per compute capability: shared memory
# per block and per multiprocessor, resident warps and blocks, registers. For 12.0 NVIDIA's pages
# differ: Blackwell's tuning guide has 32 blocks; the fewer are taken. AMD: CDNA3 and CDNA4 ISA
# guides: LDS; four SIMDs of 512 registers for each of 64 lanes, eight waves each; as many
# work-groups as waves (LLVM, AMDGPUBaseInfo.cpp, getMaxWorkGroupsPerCU).
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("sm_80", "cuda", 80, 32, 163 * KIB, "A100", 164 * KIB, 64, 32, 64 * KIB),
        Gpu("sm_86", "cuda", 86, 32, 99 * KIB, "A10, A40, RTX 30", 100 * KIB, 48, 16, 64 * KIB),
        Gpu("sm_89", "cuda", 89, 32, 99 * KIB, "L4, L40S, RTX 40", 100 * KIB, 48, 24, 64 * KIB),
        Gpu("sm_90", "cuda", 90, 32, 227 * KIB, "H100, H200", 228 * KIB, 64, 32, 64 * KIB),
        Gpu("sm_100", "cuda", 100, 32, 227 * KIB, "B200", 228 * KIB, 64, 32, 64 * KIB, True),
        Gpu("sm_120", "cuda", 120, 32, 99 * KIB, "RTX 50", 100 * KIB, 48, 24, 64 * KIB),
        Gpu("gfx942", "hip", "gfx942", 64, 64 * KIB, "MI300", 64 * KIB, 32, 32, 128 * KIB),
        Gpu("gfx950", "hip", "gfx950", 64, 160 * KIB, "MI350", 160 * KIB, 32, 32, 128 * KIB),
    )
}


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU that one can buy, as the cost model sees it.

    Attributes:
        name: for people.
        gpu: its kind, a key of GPUS.
        sms: multiprocessors (or compute units).
        clock: that it holds under load, in GHz.
        bandwidth: of its memory, in GB/s, as its maker says.
        lanes: threads for which a multiprocessor issues an instruction in a clock.
        matrix: products that a multiprocessor adds up in a clock, f16 to f32, by the instructions
            for 16 rows: mma.sync, MFMA.
        latency: of a load from memory, in microseconds.
        launch: microseconds that one kernel of a replayed graph takes besides its work.
    """

    name: str
    gpu: str
    sms: int
    clock: float
    bandwidth: float
    lanes: int
    matrix: int
    latency: float
    launch: float


# One device for each kind. Multiprocessors, bandwidth and the rates behind `matrix`: the makers'
# data sheets (A100 312 TFLOPS dense, L40S 362, RTX 5090 210, MI300X 1,307, MI355X 2,516; half that
# in products, over multiprocessors and clock). Lanes: four schedulers of 32 lanes (CUDA guide);
# AMD's four SIMDs of 16 lanes (CDNA3 white paper).
# NOTE: these are assumed, and to be measured: mma.sync has 0.63 of wgmma's rate on H200, and
# that of an A100 on B200; H200 and B200 hold 1.755 and 1.85 GHz; all latencies (loaded, not
# idle) and launches.
DEVICES = {
    device.gpu: device
    for device in (
        Device("A100 80GB", "sm_80", 108, 1.41, 2039, 128, 1024, 0.8, 2.0),
        Device("A10", "sm_86", 72, 1.695, 600, 128, 512, 0.8, 2.0),
        Device("L40S", "sm_89", 142, 2.52, 864, 128, 512, 0.8, 2.0),
        Device("H200", "sm_90", 132, 1.755, 4800, 128, 1288, 0.9, 2.0),
        Device("B200", "sm_100", 148, 1.85, 8000, 128, 1024, 1.0, 2.0),
        Device("RTX 5090", "sm_120", 170, 2.407, 1792, 128, 256, 0.8, 2.0),
        Device("MI300X", "gfx942", 304, 2.1, 5300, 64, 1024, 1.2, 4.0),
        Device("MI355X", "gfx950", 256, 2.4, 8000, 64, 2048, 1.2, 4.0),
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
            summary="Graviton 4, Grace, Axion, by TVM and zig; run in an emulator alone",
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
