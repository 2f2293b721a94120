// What this CPU can run, asked once.
#include "isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace transload {
namespace {

#if defined(__x86_64__)
// Register state that the operating system saves: bits 1-2 for AVX, 5-7 for AVX512, 17-18 for AMX.
uint64_t saved_state() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t(high) << 32 | low;
}

// Linux gives a process the AMX tile data only on request: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
bool amx_permitted() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

bool has(uint32_t word, int bit) { return word >> bit & 1; }

// Asked only where AVX512-VNNI is there.
bool has_avx512_bf16() {
  uint32_t a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, 5);
}

uint32_t probe() {
  uint32_t mask = 1u << TL_PORTABLE, a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return mask;
  const bool f16c = has(c, 29), fma = has(c, 12);
  if (!has(c, 27) || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return mask;
  const uint64_t saved = saved_state();
  const bool avx = (saved & 0x6) == 0x6, avx512 = (saved & 0xe6) == 0xe6, amx = (saved & 0x60000) == 0x60000;
  const bool avx2 = has(b, 5) && avx && fma && f16c;
  const bool avx512_vnni = avx512 && has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31) && has(c, 11);
  const bool amx_int8 = amx && avx512_vnni && has(d, 24) && has(d, 25);
  uint32_t a1 = 0, b1, c1, d1;
  if (a < 1 || !__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1)) a1 = 0;
  if (avx2) mask |= 1u << TL_AVX2;
  if (avx2 && has(a1, 4)) mask |= 1u << TL_AVX_VNNI;
  if (avx512_vnni) mask |= 1u << TL_AVX512_VNNI;
  if (amx_int8 && amx_permitted()) mask |= 1u << TL_AMX_INT8;
#if defined(TRANSLOAD_EMULATE_AMX)
  if (avx512_vnni) mask |= 1u << TL_AMX_INT8;
#endif
  return mask;
}
#elif defined(__aarch64__) && defined(__linux__)
uint32_t probe() {
  constexpr unsigned long kDotProduct = 1ul << 20;  // HWCAP_ASIMDDP
  return 1u << TL_PORTABLE | (getauxval(AT_HWCAP) & kDotProduct ? 1u << TL_NEON_DOTPROD : 0u);
}
#else
uint32_t probe() { return 1u << TL_PORTABLE; }
#endif

}  // namespace

const Isa *find_isa(int32_t isa, const Plan &plan, int64_t rows) {
  if (isa < TL_PORTABLE || isa > TL_NEON_DOTPROD || !(tl_supported() >> isa & 1)) return nullptr;
  (void)plan, (void)rows;
  switch (isa) {
#if defined(__x86_64__)
    case TL_AVX2: return &avx2_isa;
    case TL_AVX_VNNI: return &avx_vnni_isa;
    case TL_AVX512_VNNI: return &avx512_vnni_isa;
    case TL_AMX_INT8: return amx_suits(plan, rows) ? &amx_isa : &avx512_vnni_isa;
#elif defined(__aarch64__)
    case TL_NEON_DOTPROD: return &dotprod_isa;
#endif
    default: return &portable_isa;
  }
}

const Isa *find_bf16(const Isa &isa, const Plan &plan, int64_t rows, int32_t x_dtype) {
#if defined(__x86_64__)
  static const bool there = has_avx512_bf16();
  // Small groups cost the integer kernel more; codes of 8 bits cost this one more to unpack.
  const bool small = plan.segment <= 64, four = plan.weight->geometry.bits == 4;
  const int64_t fewest_tokens = four ? (small ? 8 : 12) : (small ? 32 : 96);
  if (&isa == &avx512_vnni_isa && there && plan.split && x_dtype == TL_BFLOAT16 && rows / 2 >= fewest_tokens)
    return &avx512_bf16_isa;
#endif
  (void)isa, (void)plan, (void)rows, (void)x_dtype;
  return nullptr;
}

}  // namespace transload

extern "C" uint32_t tl_supported(void) {
  static const uint32_t mask = transload::probe();
  return mask;
}
