#if defined(__x86_64__)
#define ISA avx512
#define TABLE kAvx512Kernels
#define LANES 16
#define TILE 6
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")))
#include "kernels_body.inc"
#endif
