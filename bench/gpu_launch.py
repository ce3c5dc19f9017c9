"""What the host does for a decode step before it calls the driver: `python bench/gpu_launch.py`.

No GPU is needed: tensors are torch's on the CPU, and a stand-in takes what the driver would be
given. So copies to the device cost here what a small copy on the host costs, and the call of the
driver nothing.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kvant.compiler import recipe as recipes
from kvant.compiler.shape import parse_shape, shape_model
from kvant.compiler.variants import rewrite
from kvant.ir.plan import AttentionPlan
from kvant.runtime.cache import Cache
from kvant.runtime.cuda import CudaLauncher
from kvant.runtime.launch_gpu import Kernels
from kvant.runtime.memory import TorchMemory
from kvant.targets.gpu import emit, launch_facts

SHAPE = "32x8x128"
LAYERS, STEPS, ROUNDS = 32, 64, 5
LAUNCHES = 4
"""Of a layer's step: append, prepare, attend, combine."""
TRITON_US = (20.0, 40.0)
"""What Triton's own launcher is said to take for a launch; not measured here."""


class NoDriver(CudaLauncher):
    """Packs arguments as the real launcher does, and starts nothing."""

    def __init__(self, launches: Any) -> None:
        self._kernels = {
            (key, name): (None, 0, 32)
            for key, facts in launches.items()
            for name in facts["kernels"]
        }

    def stream(self) -> int:
        """Return a stream."""
        return 0

    def is_capturing(self) -> bool:
        """Return no."""
        return False

    def start(self, name: str, given: tuple[Any, ...]) -> None:
        """Take what the driver would be given."""


def plan_of(name: str) -> AttentionPlan:
    """Return the plan of a recipe."""
    return rewrite(shape_model(parse_shape(SHAPE)), recipes.load(name)[0])[0].plan


def cache_of(plan: AttentionPlan, batch: int) -> Cache:
    """Return a cache of LAYERS layers on the CPU's memory, whose kernels do nothing."""
    launches = {"p0": launch_facts(emit(plan))}
    plans, keys = [plan] * LAYERS, ["p0"] * LAYERS
    memory = TorchMemory("cpu")
    kernels = Kernels(plans, [{}] * LAYERS, keys, launches, NoDriver(launches), memory)
    return Cache(plans, kernels, batch=batch, max_tokens=4096)


def step_of(cache: Cache, *, soon: bool) -> Callable[[], None]:
    """Return one decode step of all layers; `soon`: by what stays between two of them."""
    plan = cache.layers[0].plan
    shapes = (plan.k.heads, plan.k.channels), (plan.v.heads, plan.v.channels)
    k, v = (torch.randn(cache.batch, heads, 1, d) for heads, d in shapes)
    q = torch.randn(cache.batch, plan.q_heads, 1, plan.k.channels)

    def step() -> None:
        for layer in range(LAYERS):
            cache.append(layer, k, v)
            cache.attend(layer, q)
            if not soon:
                cache.decode = None

    return step


def planned_of(cache: Cache) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return the parts of a step at fixed addresses: what a replay needs, and the launches."""
    plan = cache.layers[0].plan
    k = torch.randn(cache.batch, plan.k.heads, 1, plan.k.channels)
    v = torch.randn(cache.batch, plan.v.heads, 1, plan.v.channels)
    q = torch.randn(cache.batch, plan.q_heads, 1, plan.k.channels)
    steps = cache.decode_steps(STEPS * (ROUNDS + 2))

    def launch() -> None:
        for layer in range(LAYERS):
            steps.append(layer, k, v)
            steps.attend(layer, q)

    return steps.plan, launch


def filled(plan: AttentionPlan, batch: int, tokens: int) -> Cache:
    """Return a cache with a prompt."""
    cache = cache_of(plan, batch)
    k = torch.zeros(batch, plan.k.heads, tokens, plan.k.channels)
    v = torch.zeros(batch, plan.v.heads, tokens, plan.v.channels)
    for layer in range(LAYERS):
        cache.append(layer, k, v)
        cache.flush_layer(layer)
    return cache


def timed(steps: Sequence[Callable[[], None]]) -> list[float]:
    """Return the median microseconds of each, taken in turns; of a round, the mean."""
    found: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    for _ in range(ROUNDS):
        for step, times in zip(steps, found, strict=True):
            begin = time.perf_counter()
            for _ in range(STEPS):
                step()
            times.append((time.perf_counter() - begin) / STEPS * 1e6)
    return [statistics.median(times) for times in found]


def measure(name: str, batch: int, tokens: int) -> dict[str, float]:
    """Return microseconds of a launch, all that the host does divided by the launches."""
    plan = plan_of(name)
    caches = [filled(plan, batch, tokens) for _ in range(3)]
    anew, soon = (
        step_of(cache, soon=s) for cache, s in zip(caches[:2], (False, True), strict=True)
    )
    for _ in range(2):
        soon()
    count, launch = planned_of(caches[2])
    count()
    times = timed((anew, soon, count, launch))
    each = LAYERS * LAUNCHES
    found = {
        "every argument anew": times[0] / each,
        "what stays, stays": times[1] / each,
        "decode_steps, launched": (times[2] + times[3]) / each,
        "a replayed graph, plan() alone, of a step": times[2],
    }
    return {key: round(value, 2) for key, value in found.items()}


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="int4-token")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.recipe, options.batch, options.tokens)
    print(json.dumps(found, indent=1))
    now = found["what stays, stays"]
    print(
        f"{found['every argument anew'] / now:.1f} times less than with every argument anew; "
        f"Triton's launcher takes {TRITON_US[0]:g} to {TRITON_US[1]:g} us a launch, "
        f"{TRITON_US[0] / now:.1f} to {TRITON_US[1] / now:.1f} times as long",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
