// The kernels of one instruction set, in GCC and Clang vector extensions. The including file defines ISA (a namespace),
// TABLE (the name of the table), LANES (floats a register), TILE (vectors that four rows meet at once: as many as leave
// the accumulators in registers) and TARGET (a function attribute).
//
// Everything has internal linkage and no standard library function is instantiated here: one compiled for AVX-512
// could otherwise be the copy that the linker keeps for all.

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kernels.h"

namespace jsparse {
namespace ISA {
namespace {

#include "body/vectors.h"
#include "body/rows.h"
#include "body/scores.h"
#include "body/products.h"
#include "body/softmax.h"
#include "body/table.h"

}  // namespace
}  // namespace ISA

#define NAME_OF(isa) #isa
#define NAME(isa) NAME_OF(isa)

extern const Kernels TABLE;
const Kernels TABLE = {
    NAME(ISA),
    ISA::ArrangedSizeOf,
    ISA::ArrangeFor,
    ISA::RestoreFrom,
    ISA::WidenOf,
    ISA::CombineFor,
    ISA::DotsOf,
    ISA::AccumulateOf,
    ISA::WeightedOf,
    ISA::FeaturesSizeOf,
    ISA::QuantizeFor,
    ISA::ScoresOf,
    ISA::AddColumnsOf,
    ISA::kDepth * ISA::kColumns,
    ISA::kColumns,
    ISA::RmsNorm,
    ISA::Exponentiate,
    ISA::Read,
};

}  // namespace jsparse
