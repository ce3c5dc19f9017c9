/* Threads and scratch memory for the kernels of one library.
 *
 * TVM's generated code calls three hooks through pointers: run a loop body in parallel, get scratch
 * memory, give it back. The constructor below fills them in, so the library needs no TVM at run time.
 *
 * A loop is cut into parts that do not depend on each other. The calling thread takes part; parts are
 * handed out one by one by a counter. Which thread computes a part never changes a bit of the result.
 * The caller wakes workers only if that is worth it: if the same loop was long the last time, at once,
 * else after the first part, which it times.
 * One thread, a nested loop, and a loop that begins while another one runs are computed in place.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <time.h>

#define MOST_THREADS 256
#define PARTS_PER_THREAD 8
#define SPINS 2000
#define WORTH_WAKING_NS 40000 /* of work left; waking and joining a worker costs about a tenth */
#define LOOPS 16 /* whose last time is remembered; a library has about half as many */
#define ALIGNMENT 64

typedef struct {
  void *sync_handle;
  int32_t num_task;
} group_env;

typedef int (*part_fn)(int part, group_env *env, void *data);

/* Weak: a library whose kernels need no scratch has no pointer for it, and looks for none outside. */
#define WEAK __attribute__((weak, visibility("hidden")))
extern void *__TVMBackendParallelLaunch WEAK;
extern void *__TVMBackendAllocWorkspace WEAK;
extern void *__TVMBackendFreeWorkspace WEAK;

static struct {
  pthread_mutex_t busy;  /* held by the thread whose loop runs */
  pthread_mutex_t lock;  /* guards what follows, and `wake` */
  pthread_cond_t wake;
  atomic_uint round;     /* counts loops; a worker that sees it change joins in */
  int open;              /* whether a worker may still join the loop */
  part_fn body;
  void *data;
  group_env env;
  atomic_int next, failed, inside;
  int workers;           /* threads that were started */
  struct { part_fn body; int64_t work_ns; } last[LOOPS]; /* of a loop's last run, all threads together */
  int loops;             /* of these that are filled */
} pool = {.busy = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static _Thread_local int in_loop;

/* KVANT_NUM_THREADS, at most the processors this thread may use; read at every loop, it is cheap
 * beside one and lets a caller change its mind. */
static int wanted_threads(void) {
  cpu_set_t set;
  int available = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : 1;
  const char *text = getenv("KVANT_NUM_THREADS");
  int wanted = text && *text ? atoi(text) : available;
  if (wanted < 1) wanted = 1;
  if (wanted > available) wanted = available;
  return wanted < MOST_THREADS ? wanted : MOST_THREADS;
}

static void take_parts(void) {
  in_loop = 1;
  for (;;) {
    int part = atomic_fetch_add(&pool.next, 1);
    if (part >= pool.env.num_task) break;
    if (pool.body(part, &pool.env, pool.data)) atomic_store(&pool.failed, 1);
  }
  in_loop = 0;
}

static void pause_briefly(void) {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

static void *work(void *unused) {
  (void)unused;
  unsigned seen = 0;
  for (;;) {
    for (int i = 0; i < SPINS && atomic_load(&pool.round) == seen; i++) pause_briefly();
    pthread_mutex_lock(&pool.lock);
    while (atomic_load(&pool.round) == seen) pthread_cond_wait(&pool.wake, &pool.lock);
    seen = atomic_load(&pool.round);
    /* Joining is counted under the lock: the caller closes a loop under it too. */
    int open = pool.open;
    if (open) atomic_fetch_add(&pool.inside, 1);
    pthread_mutex_unlock(&pool.lock);
    if (!open) continue;
    take_parts();
    atomic_fetch_sub(&pool.inside, 1);
  }
  return NULL;
}

/* Start workers until there are `count`; fewer if the system refuses. Signals stay the caller's. */
static void start_workers(int count) {
  if (pool.workers >= count) return;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  while (pool.workers < count) {
    pthread_t thread;
    pthread_attr_t attr;
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    int refused = pthread_create(&thread, &attr, work, NULL);
    pthread_attr_destroy(&attr);
    if (refused) break;
    pool.workers++;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
}

static int run_here(part_fn body, void *data) {
  group_env env = {NULL, 1};
  int outer = in_loop;
  in_loop = 1;
  int failed = body(0, &env, data);
  in_loop = outer;
  return failed;
}

static int64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Return where the time of the present loop is remembered. */
static int64_t *last_work(void) {
  for (int i = 0; i < pool.loops; i++)
    if (pool.last[i].body == pool.body) return &pool.last[i].work_ns;
  int place = pool.loops < LOOPS ? pool.loops++ : 0;
  pool.last[place].body = pool.body;
  pool.last[place].work_ns = 0;
  return &pool.last[place].work_ns;
}

/* Take one part and estimate what all take one after another, unless none is left. */
static void take_timed_part(int64_t *work) {
  int part = atomic_fetch_add(&pool.next, 1);
  if (part >= pool.env.num_task) return;
  int64_t begin = now_ns();
  in_loop = 1;
  if (pool.body(part, &pool.env, pool.data)) atomic_store(&pool.failed, 1);
  in_loop = 0;
  *work = (now_ns() - begin) * pool.env.num_task;
}

static void open_to_workers(int threads) {
  start_workers(threads - 1);
  pthread_mutex_lock(&pool.lock);
  pool.open = 1;
  atomic_fetch_add(&pool.round, 1);
  pthread_cond_broadcast(&pool.wake);
  pthread_mutex_unlock(&pool.lock);
}

static void close_to_workers(void) {
  pthread_mutex_lock(&pool.lock);
  pool.open = 0;
  pthread_mutex_unlock(&pool.lock);
  for (int spins = 0; atomic_load(&pool.inside) > 0; spins++) {
    if (spins < SPINS) pause_briefly();
    else sched_yield();
  }
}

/* Run the present loop on so many threads. One that was long the last time is shared from its first
 * part on: where parts are few, that part alone would be a whole turn. */
static void run(int threads) {
  int64_t *work = last_work();
  int shared = *work > WORTH_WAKING_NS;
  if (shared) open_to_workers(threads);
  take_timed_part(work);
  if (!shared && *work > WORTH_WAKING_NS) {
    shared = 1;
    open_to_workers(threads);
  }
  take_parts();
  if (shared) close_to_workers();
}

static int launch(part_fn body, void *data, int hint) {
  (void)hint;
  int threads = wanted_threads();
  if (threads == 1 || in_loop || pthread_mutex_trylock(&pool.busy)) return run_here(body, data);
  /* No worker is inside a loop now: these may be written without the lock. */
  pool.body = body;
  pool.data = data;
  pool.env = (group_env){NULL, threads * PARTS_PER_THREAD};
  atomic_store(&pool.next, 0);
  atomic_store(&pool.failed, 0);
  run(threads);
  int failed = atomic_load(&pool.failed);
  pthread_mutex_unlock(&pool.busy);
  return failed ? -1 : 0;
}

/* Scratch memory of a thread: a stack of blocks that only grows. TVM frees in reverse order. */
typedef struct block {
  struct block *below;
  size_t size, used;
} block;

static _Thread_local block *top;
static pthread_key_t scratch_key;

static void drop_scratch(void *unused) {
  (void)unused;
  while (top) {
    block *below = top->below;
    free(top);
    top = below;
  }
}

#define HEADER ((sizeof(block) + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT)

static void *take_scratch(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  size_t need = (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT + ALIGNMENT;
  if (!top || top->used + need > top->size) {
    size_t size = HEADER + need > (1u << 20) ? HEADER + need : (1u << 20);
    block *fresh = aligned_alloc(ALIGNMENT, (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    if (!fresh) return NULL;
    *fresh = (block){top, size, HEADER};
    top = fresh;
    pthread_setspecific(scratch_key, fresh);
  }
  /* The first line of a piece keeps where the stack stood before it. */
  char *start = (char *)top + top->used;
  *(size_t *)start = top->used;
  top->used += need;
  return start + ALIGNMENT;
}

static int give_scratch_back(int device, int id, void *piece) {
  (void)device, (void)id;
  char *start = (char *)piece - ALIGNMENT;
  while (top && (start < (char *)top || start >= (char *)top + top->size)) {
    block *below = top->below;
    if (!below) return -1;
    free(top);
    top = below;
    pthread_setspecific(scratch_key, top);
  }
  if (!top) return -1;
  top->used = *(size_t *)start;
  return 0;
}

/* A child of fork has none of the workers; it starts its own at its next loop. */
static void forget_workers(void) {
  pthread_mutex_init(&pool.busy, NULL);
  pthread_mutex_init(&pool.lock, NULL);
  pthread_cond_init(&pool.wake, NULL);
  pool.workers = 0;
  pool.open = 0;
  atomic_store(&pool.inside, 0);
  in_loop = 0;
}

__attribute__((constructor)) static void set_hooks(void) {
  pthread_key_create(&scratch_key, drop_scratch);
  pthread_atfork(NULL, NULL, forget_workers);
  if (&__TVMBackendParallelLaunch) __TVMBackendParallelLaunch = (void *)launch;
  if (&__TVMBackendAllocWorkspace) __TVMBackendAllocWorkspace = (void *)take_scratch;
  if (&__TVMBackendFreeWorkspace) __TVMBackendFreeWorkspace = (void *)give_scratch_back;
}
