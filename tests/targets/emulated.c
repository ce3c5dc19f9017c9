/* Calls the kernel attend with the arguments in in.bin, under an emulator of another processor.
 *
 * in.bin: 64-bit numbers: how many arguments; for each 0 and an integer, or 1, the code and the bits
 * of its type (of DLPack), its dimensions, its bytes, its shape, and then the bytes. out.bin: the bytes of
 * all arrays after the call. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct {
  int32_t kind, zero;
  union {
    int64_t number;
    void *pointer;
  } value;
} argument;

typedef struct {
  void *data;
  int32_t device, device_id, dimensions;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t offset;
} tensor;

enum { INTEGER = 1, TENSOR = 7, CPU = 1, PAGE = 4096 };

int __tvm_ffi_attend(void *self, argument *given, int32_t count, argument *result);

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  fprintf(stderr, "%s:", kind);
  for (int i = 0; i < count; i++) fprintf(stderr, " %s", parts[i]);
}

static void take(FILE *file, void *into, size_t bytes) {
  if (bytes && fread(into, bytes, 1, file) != 1) exit(2);
}

static int64_t number(FILE *file) {
  int64_t read;
  take(file, &read, sizeof read);
  return read;
}

static int64_t read_tensor(FILE *file, tensor *t) {
  t->code = number(file), t->bits = number(file), t->lanes = 1, t->device = CPU;
  t->dimensions = number(file);
  int64_t bytes = number(file), step = 1;
  t->shape = calloc(2 * t->dimensions + 2, sizeof *t->shape);
  t->strides = t->shape + t->dimensions + 1;
  for (int i = 0; i < t->dimensions; i++) t->shape[i] = number(file);
  for (int i = t->dimensions; i-- > 0; step *= t->shape[i]) t->strides[i] = step;
  t->data = aligned_alloc(PAGE, (bytes / PAGE + 1) * PAGE);
  take(file, t->data, bytes);
  return bytes;
}

int main(void) {
  FILE *in = fopen("in.bin", "rb"), *out = fopen("out.bin", "wb");
  int64_t count = number(in);
  argument *given = calloc(count, sizeof *given), result = {0};
  tensor *tensors = calloc(count, sizeof *tensors);
  int64_t *bytes = calloc(count, sizeof *bytes);
  for (int64_t i = 0; i < count; i++) {
    if (number(in)) {
      bytes[i] = read_tensor(in, &tensors[i]);
      given[i] = (argument){.kind = TENSOR, .value.pointer = &tensors[i]};
    } else {
      given[i] = (argument){.kind = INTEGER, .value.number = number(in)};
    }
  }
  if (__tvm_ffi_attend(0, given, count, &result)) return 3;
  for (int64_t i = 0; i < count; i++)
    if (given[i].kind == TENSOR) fwrite(tensors[i].data, 1, bytes[i], out);
  return fclose(out);
}
