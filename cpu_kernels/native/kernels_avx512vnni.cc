#if defined(__x86_64__)
#define ISA avx512vnni
#define TABLE kAvx512VnniKernels
#define LANES 16
#define VNNI
#define TILE 6
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,avx512vnni")))
#include "kernels_body.inc"
#endif
