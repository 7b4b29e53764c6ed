// How many threads the kernels may use: the loader knows what the system allows this process.

#include "native_workers.h"

extern "C" void kvcascade_threads(int64_t most) { kvcascade::Workers::most = most; }
