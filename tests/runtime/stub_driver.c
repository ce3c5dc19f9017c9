/* Stands for the driver's library: every call succeeds and does nothing, but a launch is printed. */
#include <stdio.h>
#include <string.h>

static int nothing(void) { return 0; }
static int version(int *found) { *found = 13000; return 0; }
static int count(int *found) { *found = 1; return 0; }

static int launch(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                  unsigned bz, unsigned shared, void *stream, void **arguments, void **extra) {
    printf("%u %u %u, %u %u %u, %u, %p:", gx, gy, gz, bx, by, bz, shared, stream);
    for (int i = 0; i < 5; i++) printf(" %lld", *(long long *)arguments[i]);
    printf("\n");
    fflush(stdout);
    return f == 0 || extra != 0;
}

int cuGetProcAddress_v2(const char *name, void **found, int v, unsigned long flags, int *status) {
    (void)v, (void)flags;
    if (status) *status = 0;
    *found = (void *)nothing;
    if (!strcmp(name, "cuDriverGetVersion")) *found = (void *)version;
    if (!strcmp(name, "cuDeviceGetCount")) *found = (void *)count;
    if (!strcmp(name, "cuLaunchKernel")) *found = (void *)launch;
    if (!strncmp(name, "cuGetProcAddress", 16)) *found = (void *)cuGetProcAddress_v2;
    return 0;
}
