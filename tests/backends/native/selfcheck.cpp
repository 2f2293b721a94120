// The native library checked from C++, where sanitizers and other processors' emulators can watch: see ci/sanitizers.
// Random weights of every kind on every instruction set of this CPU, against double precision computed from the codes.
// Every buffer has exactly the size that the interface asks for, so that one byte too many is found.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "transload_native.h"

namespace {

std::mt19937 generator(1);
int failures = 0;

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
float gaussian() { return std::normal_distribution<float>()(generator); }

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The value with the lower half of its bits cut off: exact in bfloat16.
float bfloat16(float value) { return float_of(bits_of(value) & 0xffff0000u); }

struct Weight {
  tl_geometry g;
  int64_t groups;
  std::vector<uint8_t> codes, code_zeros, packed;
  std::vector<float> scales, float_zeros;
  std::vector<int32_t> order;

  const void *zeros() const {
    if (g.zero == TL_ZERO_MIDPOINT) return nullptr;
    return g.zero == TL_ZERO_CODES ? static_cast<const void *>(code_zeros.data()) : float_zeros.data();
  }

  double at(int64_t e, int64_t n, int64_t place) const {
    const int64_t group = g.group_size == -1 ? 0 : place / g.group_size, side = (e * g.n + n) * groups + group;
    const double code = codes[static_cast<size_t>((e * g.n + n) * g.k + place)];
    const double scale = scales[static_cast<size_t>(side)];
    if (g.zero == TL_ZERO_MIDPOINT) return scale * (code - g.midpoint);
    if (g.zero == TL_ZERO_CODES) return scale * (code - code_zeros[static_cast<size_t>(side)]);
    const double zero = float_zeros[static_cast<size_t>(side)];
    return g.zero == TL_ZERO_FLOATS ? scale * (code - zero) : scale * code + zero;
  }
};

void expect(bool good, const char *what, const tl_geometry &g, int isa) {
  if (good) return;
  failures++;
  const long long n = g.n, k = g.k, group = g.group_size, experts = g.experts;
  std::printf("FAILED %s: n=%lld k=%lld group=%lld experts=%lld bits=%d zero=%d order=%d isa=%d\n", what, n, k, group,
              experts, g.bits, g.zero, g.act_order, isa);
}

Weight random_weight() {
  const int64_t group_sizes[] = {-1, 8, 16, 32, 48, 64, 128, 256, 512};
  Weight w{};
  constexpr int kBits[] = {4, 4, 5, 6, 8, 8};
  w.g.bits = kBits[between(0, 5)];
  w.g.zero = static_cast<int32_t>(between(0, 3));
  w.g.midpoint = w.g.zero == TL_ZERO_MIDPOINT ? 1 << (w.g.bits - 1) : 0;
  w.g.scale_dtype = TL_FLOAT32;
  w.g.n = between(1, 70), w.g.k = between(1, 600), w.g.experts = between(0, 3) ? 1 : between(2, 4);
  w.g.group_size = group_sizes[between(0, 8)];
  w.g.act_order = between(0, 4) == 0;
  w.groups = w.g.group_size == -1 ? 1 : (w.g.k - 1) / w.g.group_size + 1;
  const auto outputs = static_cast<size_t>(w.g.experts * w.g.n);
  for (size_t i = 0; i < outputs * static_cast<size_t>(w.g.k); i++)
    w.codes.push_back(static_cast<uint8_t>(between(0, (1 << w.g.bits) - 1)));
  for (size_t i = 0; i < outputs * static_cast<size_t>(w.groups); i++) {
    w.scales.push_back(between(0, 9) ? gaussian() * 0.01f : 0.f);
    w.code_zeros.push_back(static_cast<uint8_t>(between(0, (1 << w.g.bits) - 1)));
    w.float_zeros.push_back(w.g.zero == TL_ZERO_MINS ? gaussian() * 0.1f : gaussian() * 4.f);
  }
  if (w.g.act_order) {
    for (int32_t i = 0; i < w.g.k; i++) w.order.push_back(i);
    std::shuffle(w.order.begin(), w.order.end(), generator);
  }
  int64_t bytes = 0;
  expect(tl_packed_bytes(&w.g, &bytes) == TL_OK, "packed_bytes", w.g, -1);
  w.packed.resize(static_cast<size_t>(bytes));
  expect(tl_pack(&w.g, w.codes.data(), w.scales.data(), w.zeros(), w.g.act_order ? w.order.data() : nullptr,
                 w.packed.data(), bytes, 2) == TL_OK, "pack", w.g, -1);
  return w;
}

void check_unpack(const Weight &w) {
  std::vector<uint8_t> codes(w.codes.size()), code_zeros(w.code_zeros.size());
  std::vector<float> scales(w.scales.size()), float_zeros(w.float_zeros.size());
  std::vector<int32_t> order(w.order.size());
  void *zeros = w.g.zero == TL_ZERO_CODES ? static_cast<void *>(code_zeros.data()) : float_zeros.data();
  const auto bytes = static_cast<int64_t>(w.packed.size());
  const int32_t status = tl_unpack(w.packed.data(), bytes, codes.data(), scales.data(), zeros, order.data(), 2);
  expect(status == TL_OK, "unpack", w.g, -1);
  expect(codes == w.codes && scales == w.scales && order == w.order, "unpack is exact", w.g, -1);
  if (w.g.zero == TL_ZERO_CODES) expect(code_zeros == w.code_zeros, "unpack zeros", w.g, -1);
  if (w.g.zero >= TL_ZERO_FLOATS) expect(float_zeros == w.float_zeros, "unpack float zeros", w.g, -1);
  std::vector<float> floats(w.codes.size());
  const int64_t outputs = w.g.experts * w.g.n, cut_at = outputs / 3;
  float *rest = floats.data() + cut_at * w.g.k;
  expect(tl_dequantize(w.packed.data(), bytes, 0, cut_at, TL_FLOAT32, floats.data(), 2) == TL_OK &&
             tl_dequantize(w.packed.data(), bytes, cut_at, outputs - cut_at, TL_FLOAT32, rest, 2) == TL_OK,
         "dequantize", w.g, -1);
  for (int64_t e = 0; e < w.g.experts; e++)
    for (int64_t n = 0; n < w.g.n; n++)
      for (int64_t p = 0; p < w.g.k; p++) {
        const int64_t input = w.g.act_order ? w.order[static_cast<size_t>(p)] : p;
        const double error = floats[static_cast<size_t>((e * w.g.n + n) * w.g.k + input)] - w.at(e, n, p);
        if (std::fabs(error) > 1e-5) return expect(false, "dequantized weight", w.g, -1);
      }
  for (int64_t cut = 0; cut < bytes; cut += bytes / 7 + 1) {
    const std::vector<uint8_t> part(w.packed.begin(), w.packed.begin() + cut);
    tl_geometry g;
    expect(tl_describe(part.data(), cut, &g) != TL_OK, "truncation is noticed", w.g, -1);
  }
}

void check_rows(const Weight &w) {
  if (w.g.experts != 1) return;
  const int64_t index[] = {w.g.n - 1, 0};
  std::vector<uint8_t> codes(static_cast<size_t>(2 * w.g.k)), code_zeros(static_cast<size_t>(2 * w.groups));
  std::vector<float> scales(static_cast<size_t>(2 * w.groups)), float_zeros(scales);
  std::vector<int32_t> order(w.order.size());
  void *zeros = w.g.zero == TL_ZERO_CODES ? static_cast<void *>(code_zeros.data()) : float_zeros.data();
  const auto bytes = static_cast<int64_t>(w.packed.size());
  const int32_t status =
      tl_rows(w.packed.data(), bytes, index, 2, codes.data(), scales.data(), zeros, order.data());
  expect(status == TL_OK, "rows", w.g, -1);
  const bool same = std::memcmp(codes.data() + w.g.k, w.codes.data(), static_cast<size_t>(w.g.k)) == 0;
  expect(same && scales[static_cast<size_t>(w.groups)] == w.scales[0], "the second row is row 0", w.g, -1);
}

// Activations as the library quantizes them: a true division, half to even, one scale per `group` places.
std::vector<double> quantized(const std::vector<float> &x, int64_t group, double limit) {
  std::vector<double> out(x.size());
  for (size_t from = 0; from < x.size(); from += static_cast<size_t>(group)) {
    const size_t to = std::min(x.size(), from + static_cast<size_t>(group));
    float top = 0;
    for (size_t i = from; i < to; i++) top = std::max(top, std::fabs(x[i]));
    const float step = top / static_cast<float>(limit);
    for (size_t i = from; i < to; i++) out[i] = step > 0 ? double(step) * std::nearbyint(x[i] / step) : 0;
  }
  return out;
}

void check_matmul(const Weight &w, int isa) {
  const int64_t m = w.g.experts > 1 ? between(0, 150) : between(1, 130), k = w.g.k, stride = k + between(0, 3);
  std::vector<float> x(static_cast<size_t>(m > 0 ? (m - 1) * stride + k : 0));
  std::vector<float> bias(static_cast<size_t>(w.g.experts * w.g.n));
  std::vector<float> y(static_cast<size_t>(m * w.g.n));
  const bool int8 = between(0, 1), halves = !int8 && between(0, 1);
  for (float &v : x) v = halves ? bfloat16(gaussian()) : gaussian();
  for (float &v : bias) v = gaussian();
  std::vector<int64_t> counts(static_cast<size_t>(w.g.experts), 0);
  for (int64_t i = 0; i < m; i++) counts[static_cast<size_t>(between(0, w.g.experts - 1))]++;
  const int64_t group = between(0, 1) ? -1 : w.g.group_size == -1 ? 32 : w.g.group_size;
  const int64_t *rows = w.g.experts > 1 ? counts.data() : nullptr;
  std::vector<uint16_t> half_x, half_y(y.size());
  for (const float v : x) half_x.push_back(static_cast<uint16_t>(bits_of(v) >> 16));
  const void *given = halves ? static_cast<const void *>(half_x.data()) : x.data();
  void *result = halves ? static_cast<void *>(half_y.data()) : y.data();
  const tl_product call{w.packed.data(), int64_t(w.packed.size()), given, stride, m, rows, bias.data(), result,
                        group, int8 ? 8 : 16, halves ? TL_BFLOAT16 : TL_FLOAT32, isa, 2};
  expect(tl_matmul(&call) == TL_OK, "matmul", w.g, isa);
  if (halves)
    for (size_t i = 0; i < y.size(); i++) y[i] = float_of(uint32_t(half_y[i]) << 16);
  int64_t row = 0;
  for (int64_t e = 0; e < w.g.experts; e++)
    for (int64_t i = 0; i < (w.g.experts > 1 ? counts[static_cast<size_t>(e)] : m); i++, row++) {
      std::vector<float> places;
      for (int64_t p = 0; p < k; p++)
        places.push_back(x[static_cast<size_t>(row * stride + (w.g.act_order ? w.order[static_cast<size_t>(p)] : p))]);
      const std::vector<double> a = int8 ? quantized(places, group == -1 ? k : group, 127)
                                         : std::vector<double>(places.begin(), places.end());
      for (int64_t n = 0; n < w.g.n; n++) {
        double truth = bias[static_cast<size_t>(e * w.g.n + n)], size = std::fabs(truth) + 1e-6;
        for (int64_t p = 0; p < k; p++) {
          const double product = a[static_cast<size_t>(p)] * w.at(e, n, p);
          truth += product;
          size += std::fabs(product);
        }
        const double error = std::fabs(y[static_cast<size_t>(row * w.g.n + n)] - truth);
        const double allowed = int8 ? 1e-5 : halves ? 1e-2 : 1e-3;
        if (!(error <= size * allowed)) return expect(false, int8 ? "W4A8 sum" : "W4A16 sum", w.g, isa);
      }
    }
}

// Several callers share a weight and the workers; each gets the bits of one thread alone.
void check_callers(const Weight &w, int isa) {
  if (w.g.experts != 1) return;
  const int64_t m = between(1, 100), group = w.g.group_size;
  std::vector<float> x(static_cast<size_t>(m * w.g.k)), alone(static_cast<size_t>(m * w.g.n));
  for (float &v : x) v = gaussian();
  const auto product = [&](float *y, int threads) {
    const tl_product call{w.packed.data(), int64_t(w.packed.size()), x.data(), w.g.k, m, nullptr, nullptr, y,
                          group,           8,                        TL_FLOAT32, isa, threads};
    return tl_matmul(&call) == TL_OK;
  };
  expect(product(alone.data(), 1), "matmul", w.g, isa);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int c = 0; c < 4; c++)
    callers.emplace_back([&, c] {
      for (int i = 0; i < 3; i++) {
        std::vector<float> y(alone.size());
        wrong += !product(y.data(), 1 + (c + i) % 4) || std::memcmp(y.data(), alone.data(), y.size() * 4) != 0;
      }
    });
  for (std::thread &c : callers) c.join();
  expect(wrong == 0, "callers at once", w.g, isa);
}

}  // namespace

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 200;
  for (int i = 0; i < rounds; i++) {
    const Weight w = random_weight();
    check_unpack(w);
    check_rows(w);
    for (int isa = TL_PORTABLE; isa <= TL_NEON_DOTPROD; isa++)
      if (tl_supported() >> isa & 1) check_matmul(w, isa), check_callers(w, isa);
  }
  std::printf("%d weights, instruction sets 0x%x: %d passed, %d failed\n", rounds, tl_supported(), rounds - failures,
              failures);
  return failures != 0;
}
