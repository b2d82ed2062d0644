#if defined(__x86_64__)
#define ISA avx2
#define TABLE kAvx2Kernels
#define LANES 8
#define TILE 3
#define TARGET __attribute__((target("avx2,fma,f16c")))
#include "kernels_body.inc"
#endif
