#include "kernels.h"

namespace jsparse {

extern const Kernels kBaselineKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
#endif

namespace {

struct Choice {
  const Kernels* tables[5] = {};

  Choice() {
    int n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512vnni")) tables[n++] = &kAvx512VnniKernels;
      tables[n++] = &kAvx512Kernels;
    }
    if (avx2) tables[n++] = &kAvx2Kernels;
#endif
    tables[n] = &kBaselineKernels;
  }
};

const Choice& TheChoice() {
  static const Choice choice;
  return choice;
}

}  // namespace

const Kernels& BestKernels() { return *TheChoice().tables[0]; }
const Kernels* const* RunnableKernels() { return TheChoice().tables; }

}  // namespace jsparse
