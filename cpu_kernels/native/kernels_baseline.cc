// Any processor: SSE2 on x86-64, NEON on AArch64, whatever the compiler has elsewhere.
#define ISA baseline
#define TABLE kBaselineKernels
#define LANES 4
#if defined(__aarch64__)
#define TILE 6  // of 32 registers
#else
#define TILE 3
#endif
#define TARGET
#include "kernels_body.inc"
