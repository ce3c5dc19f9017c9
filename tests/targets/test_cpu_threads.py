"""Threads: the same bits for any number, several callers at once, after fork; who joins when."""

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from kvant.ir.arrays import Array
from kvant.runtime.cache import Cache

from .cpu_cases import INTEGER, KIVI, constants_of, files_of, kernels_of

LENGTH = 1100


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two processors")
    monkeypatch.setenv("KVANT_NUM_THREADS", "2")


def run(plan: object, threads: int, monkeypatch: pytest.MonkeyPatch) -> list[Array]:
    """Everything a kernel gives, from an empty cache on."""
    monkeypatch.setenv("KVANT_NUM_THREADS", str(threads))
    assert plan in (INTEGER, KIVI)
    kernels = kernels_of([plan], [constants_of(plan)])  # type: ignore[list-item,arg-type]
    rng = np.random.default_rng(2)
    cache = Cache([plan], kernels, batch=2, max_tokens=2048)  # type: ignore[list-item]
    shape = (2, 2, LENGTH, cache.layers[0].plan.k.channels)
    cache.append(0, rng.normal(size=shape).astype("f4"), rng.normal(size=shape).astype("f4"))
    cache.flush()
    results = [s.pages[: s.pool.high].copy() for s in cache.layers[0].streams]
    for queries in (1, 11):
        q = rng.normal(size=(2, 4, queries, shape[-1])).astype("f4")
        results += kernels.attend(0, q, *cache.layers[0].streams)
    return results


@pytest.mark.parametrize("plan", [INTEGER, KIVI], ids=["int", "kivi"])
def test_one_thread_equals_two(
    plan: object, threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = run(plan, 1, monkeypatch), run(plan, 2, monkeypatch)
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert any(np.abs(a).max() > 0.1 for a in one[2:])


def test_callers_at_once_do_not_disturb_each_other(threads: None) -> None:
    kernels = kernels_of([INTEGER], [{}])
    rng = np.random.default_rng(2)
    cache = Cache([INTEGER], kernels, batch=1, max_tokens=2048)
    x = rng.normal(size=(1, 2, LENGTH, 128)).astype("f4")
    cache.append(0, x, x)
    queries = rng.normal(size=(4, 1, 4, 1, 128)).astype("f4")
    streams = cache.layers[0].streams
    want = [kernels.attend(0, q, *streams)[0] for q in queries]
    wrong: list[int] = []

    def call(i: int) -> None:
        for _ in range(50):
            if not np.array_equal(kernels.attend(0, queries[i], *streams)[0], want[i]):
                wrong.append(i)

    callers = [threading.Thread(target=call, args=(i,)) for i in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert wrong == []


FORK = """
import os, sys
import numpy as np
from kvant.runtime.launch_cpu import load_library
folder = sys.argv[1]
names = ("kernels.so", "launch.json")
library = load_library({n: open(f"{folder}/{n}", "rb").read() for n in names}, "test")
x = np.random.default_rng(0).normal(size=(1, 4, 64, 128)).astype(np.float32)

def prepared():
    query = np.zeros(x.size, np.float32)
    values = {"q": x, "query": query, "q_codes": np.zeros(x.size, np.int8), "batch": 1}
    values |= {"q_step": np.zeros(256, np.float32), "queries": 64, "rows": 128}
    library.call("prepare", values)
    return query

want = prepared()
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(prepared(), want) else 3)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(prepared(), want)
assert np.abs(want).max() > 0
print("same")
"""


def test_a_forked_child_computes(threads: None, tmp_path: Path) -> None:
    for name, data in files_of(INTEGER).items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "same", done.stderr


LAUNCHER = """
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>
void *__TVMBackendParallelLaunch;
static atomic_int others, joined;
static pthread_t caller;
static int is_long;

static int body(int part, void *env, void *data) {
  if (!pthread_equal(pthread_self(), caller)) others = 1;
  if (is_long && part == 0) {
    for (int i = 0; i < 500 && !others; i++) usleep(1000);
    joined = others;
  }
  return 0;
}

/* Return whether another thread came: before the first part of a long loop was through, or ever. */
int run_loop(int wanted) {
  caller = pthread_self();
  is_long = wanted;
  others = joined = 0;
  ((int (*)(void *, void *, int))__TVMBackendParallelLaunch)(body, 0, 0);
  return is_long ? joined : others;
}
"""


def test_a_loop_that_was_long_is_shared_from_its_first_part_on(
    threads: None, tmp_path: Path
) -> None:
    (tmp_path / "launcher.c").write_text(LAUNCHER)
    pool = Path(__file__).parents[2] / "targets" / "pool.c"
    command = ["cc", "-shared", "-fPIC", "-pthread", "-o", "pool.so", str(pool), "launcher.c"]
    subprocess.run(command, cwd=tmp_path, check=True)
    run_loop = ctypes.CDLL(str(tmp_path / "pool.so")).run_loop
    assert not run_loop(True), "a loop that nobody knows begins alone"
    assert run_loop(True), "one that was long does not"
    run_loop(False)  # it was long, so workers are woken once more, and its time is seen
    # Whoever interrupts the first part makes one loop seem long.
    assert not all(run_loop(False) for _ in range(5)), "a short loop wakes nobody"
