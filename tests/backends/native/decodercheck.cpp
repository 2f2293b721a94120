// The decoder's step checked from C++ under sanitizers: see ci/sanitizers. Random decoders on every instruction set,
// against the portable code; with more threads, and from several callers at once, bit for bit against one thread. The
// caches have exactly the size that the interface asks for.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "transload_native.h"

namespace {

std::mt19937 generator(1);

int64_t between(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

std::vector<float> gaussian(int64_t count, float mean, float deviation) {
  std::normal_distribution<float> draw(mean, deviation);
  std::vector<float> out(static_cast<size_t>(count));
  for (float &v : out) v = draw(generator);
  return out;
}

// Everything that a decoder points to.
struct Model {
  tl_decoder_shape shape{};
  std::vector<std::unique_ptr<tl_experts>> experts;
  std::vector<tl_decoder_layer> layers;
  std::vector<tl_linear> linears;
  std::vector<std::vector<uint8_t>> packed;
  std::vector<std::vector<float>> floats;
  bool exact = true;  // whether instruction sets agree

  const float *keep(std::vector<float> values) {
    floats.push_back(std::move(values));
    return floats.back().data();
  }

  const float *norm(int64_t n) { return keep(gaussian(n, 1, 0.1f)); }
};

// Codes, scales and zeros of a random kind: weights of about 1 / sqrt(k).
void add_packed(Model &m, int64_t n, int64_t k, int64_t experts, bool bias) {
  tl_geometry g{n, k, between(0, 3) ? 8 * between(1, 8) : -1, experts, between(0, 2) ? 4 : 8, 0, 0, TL_FLOAT32, 0, 0};
  g.zero = static_cast<int32_t>(between(0, 1));  // a midpoint, or codes around it
  const int middle = g.bits == 4 ? 8 : 128;
  g.midpoint = g.zero == TL_ZERO_MIDPOINT ? middle : 0;
  const int64_t groups = g.group_size == -1 ? 1 : (k - 1) / g.group_size + 1;
  std::vector<uint8_t> codes(static_cast<size_t>(experts * n * k));
  std::vector<uint8_t> zeros(static_cast<size_t>(experts * n * groups), uint8_t(middle));
  for (uint8_t &c : codes) c = static_cast<uint8_t>(between(0, 2 * middle - 1));
  const float scale = 1.f / (static_cast<float>(middle) * std::sqrt(static_cast<float>(k)));
  const std::vector<float> scales(static_cast<size_t>(experts * n * groups), scale);
  int64_t bytes = 0;
  tl_packed_bytes(&g, &bytes);
  m.packed.emplace_back(static_cast<size_t>(bytes));
  tl_pack(&g, codes.data(), scales.data(), g.zero ? zeros.data() : nullptr, nullptr, m.packed.back().data(), bytes, 1);
  const int32_t bits = between(0, 1) ? 8 : 16;
  m.linears.push_back({m.packed.back().data(), bytes, n, k, experts,
                       bias ? m.keep(gaussian(experts * n, 0, 0.1f)) : nullptr,
                       between(0, 1) ? -1 : g.group_size, bits, 0});
}

void add_floats(Model &m, int64_t n, int64_t k, int64_t experts) {
  const float *weight = m.keep(gaussian(experts * n * k, 0, 1 / std::sqrt(static_cast<float>(k))));
  m.linears.push_back({weight, 0, n, k, experts, nullptr, 0, 0, TL_FLOAT32});
}

// n outputs in one or several parts; returns how many.
int32_t add_linear(Model &m, int64_t n, int64_t k, int64_t experts = 1) {
  int32_t parts = 0;
  while (n > 0) {
    const int64_t rows = between(0, 1) ? n : between(1, n);
    if (between(0, 4))
      add_packed(m, rows, k, experts, between(0, 1) != 0);
    else
      add_floats(m, rows, k, experts);
    n -= rows;
    parts++;
  }
  return parts;
}

// Experts of a random kind behind the layer's other linears. Unless all of them are chosen, rounding may choose others.
const tl_experts *add_experts(Model &m, int64_t hidden, bool all) {
  const int64_t groups = between(1, 3), size = between(2, 6), experts = groups * size, width = between(1, 60);
  const int64_t top_groups = all ? groups : between(1, groups), top_k = all ? experts : between(1, top_groups * size);
  const bool sigmoid = between(0, 1) != 0;
  tl_experts e{experts, top_k, groups, top_groups, sigmoid ? m.keep(gaussian(experts, 0, 0.1f)) : nullptr,
               sigmoid ? 1.5f : 1.f, sigmoid, static_cast<int32_t>(between(0, 1)), 0, 0, 0, 0};
  e.router = add_linear(m, experts, hidden);
  if (between(0, 1)) e.shared_gate = add_linear(m, 1, hidden);
  e.gate_up = add_linear(m, 2 * width, hidden, experts);
  e.down = add_linear(m, hidden, width, experts);
  m.experts.push_back(std::make_unique<tl_experts>(e));
  return m.experts.back().get();
}

void fill(Model &m) {
  const int64_t mixture = between(0, 3);  // 0 and 1: none; 2: all experts chosen; 3: some
  m.exact = mixture < 3;

  const int64_t kv = between(1, 3), ratio = between(1, 4), dim = between(1, 48) * 2;
  tl_decoder_shape &s = m.shape;
  s = {between(1, 3), between(1, 160), kv * ratio, kv, dim, 2 * between(0, dim / 2), 1e-5f,
       1 / std::sqrt(static_cast<float>(dim)), static_cast<int32_t>(between(0, 1)), TL_PORTABLE, nullptr};
  s.norm = m.norm(s.hidden);
  for (int64_t i = 0; i < s.layers; i++) {
    const auto maybe = [&](int64_t n) { return between(0, 1) ? m.norm(n) : nullptr; };
    tl_decoder_layer l{m.norm(s.hidden), maybe(dim), maybe(dim), maybe(s.hidden), m.norm(s.hidden), maybe(s.hidden),
                       between(0, 1) ? between(1, 20) : 0, 0, 0, 0, 0, nullptr};
    l.qkv = add_linear(m, (s.heads + 2 * kv) * dim, s.hidden);
    l.out = add_linear(m, s.hidden, s.heads * dim);
    const bool experts = mixture > 1 && between(0, 3);
    if (!experts || between(0, 1)) {
      const int64_t width = between(1, 200);
      l.gate_up = add_linear(m, 2 * width, s.hidden);
      l.down = add_linear(m, s.hidden, width);
    }
    if (experts) l.experts = add_experts(m, s.hidden, mixture == 2);
    m.layers.push_back(l);
  }
}

// Hidden states of `tokens` tokens, one step after the other; empty when a call fails.
std::vector<float> decode(const void *decoder, const Model &m, const std::vector<float> &x, int64_t tokens,
                          int32_t dtype, int threads) {
  const tl_decoder_shape &s = m.shape;
  const size_t room = static_cast<size_t>(s.kv_heads * tokens * s.head_dim * (dtype == TL_FLOAT32 ? 4 : 2));
  std::vector<std::vector<uint8_t>> caches(static_cast<size_t>(2 * s.layers), std::vector<uint8_t>(room, 0xff));
  std::vector<void *> keys, values;
  for (size_t i = 0; i < caches.size(); i++) (i % 2 ? values : keys).push_back(caches[i].data());
  std::vector<float> out(x.size());
  for (int64_t t = 0; t < tokens; t++) {
    std::vector<float> cos, sin;
    for (int64_t i = 0; i < s.rotary / 2; i++) {
      const float angle = static_cast<float>(t) / static_cast<float>(i + 1);
      cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
    }
    const tl_decoder_token token{x.data() + t * s.hidden, cos.data(), sin.data(), keys.data(), values.data(), tokens, t,
                                 out.data() + t * s.hidden, dtype, threads};
    const bool angles = s.rotary > 0;
    tl_decoder_token given = token;
    if (!angles) given.cos = given.sin = nullptr;
    if (tl_decoder_step(decoder, &given) != TL_OK) return {};
  }
  return out;
}

// The same with all tokens but the first in one call.
std::vector<float> prompt(const void *decoder, const Model &m, const std::vector<float> &x, int64_t tokens,
                          int32_t dtype, int threads) {
  const tl_decoder_shape &s = m.shape;
  const size_t room = static_cast<size_t>(s.kv_heads * tokens * s.head_dim * (dtype == TL_FLOAT32 ? 4 : 2));
  std::vector<std::vector<uint8_t>> caches(static_cast<size_t>(2 * s.layers), std::vector<uint8_t>(room, 0xff));
  std::vector<void *> keys, values;
  for (size_t i = 0; i < caches.size(); i++) (i % 2 ? values : keys).push_back(caches[i].data());
  std::vector<float> out(x.size()), cos, sin;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t i = 0; i < s.rotary / 2; i++) {
      const float angle = static_cast<float>(t) / static_cast<float>(i + 1);
      cos.push_back(std::cos(angle)), sin.push_back(std::sin(angle));
    }
  const tl_decoder_token first{x.data(), s.rotary ? cos.data() : nullptr, s.rotary ? sin.data() : nullptr, keys.data(),
                               values.data(), tokens, 0, out.data(), dtype, threads};
  if (tl_decoder_step(decoder, &first) != TL_OK) return {};
  if (tokens == 1) return out;
  const int64_t half = s.rotary / 2;
  const tl_decoder_prompt rest{x.data() + s.hidden, s.rotary ? cos.data() + half : nullptr,
                               s.rotary ? sin.data() + half : nullptr, keys.data(), values.data(), tokens, 1,
                               tokens - 1, out.data() + s.hidden, dtype, threads};
  return tl_decoder_prompt_run(decoder, &rest) == TL_OK ? out : std::vector<float>();
}

double distance(const std::vector<float> &a, const std::vector<float> &b) {
  double off = 0, all = 1e-30;
  for (size_t i = 0; i < a.size(); i++) off += std::pow(double(a[i]) - b[i], 2), all += std::pow(double(b[i]), 2);
  return std::sqrt(off / all);
}

// Float weights times a vector, in memory of exactly their size.
bool float_products_agree() {
  const int64_t n = between(1, 300), k = between(1, 300);
  const auto dtype = static_cast<int32_t>(between(TL_FLOAT32, TL_FLOAT16));
  const std::vector<float> x = gaussian(2 * k, 0, 1);
  std::vector<uint8_t> w(static_cast<size_t>(n * k * (dtype == TL_FLOAT32 ? 4 : 2)));
  for (size_t i = 0; i < w.size(); i++) w[i] = static_cast<uint8_t>(between(0, 255)) & (i % 2 ? 0xbf : 0xff);
  if (dtype == TL_FLOAT32)
    for (size_t i = 3; i < w.size(); i += 4) w[i] = static_cast<uint8_t>(0x3f | (w[i] & 0x80));
  std::vector<float> portable, y(static_cast<size_t>(2 * n));
  for (int32_t isa = TL_PORTABLE; isa <= TL_NEON_DOTPROD; isa++) {
    if (!(tl_supported() >> isa & 1)) continue;
    if (tl_float_product(w.data(), dtype, n, k, x.data(), 2, y.data(), isa, 2) != TL_OK) return false;
    if (isa == TL_PORTABLE) portable = y;
    if (!(distance(y, portable) < 1e-4)) return false;
  }
  return true;
}

bool check(const Model &m, int32_t dtype, int64_t tokens) {
  const std::vector<float> x = gaussian(tokens * m.shape.hidden, 0, 1);
  std::vector<float> portable;
  bool good = true;
  for (int32_t isa = TL_PORTABLE; isa <= TL_NEON_DOTPROD; isa++) {
    if (!(tl_supported() >> isa & 1)) continue;
    tl_decoder_shape shape = m.shape;
    shape.isa = isa;
    void *decoder = nullptr;
    const auto count = static_cast<int64_t>(m.linears.size());
    if (tl_decoder_new(&shape, m.layers.data(), m.linears.data(), count, &decoder) != TL_OK) return false;
    const std::vector<float> one = decode(decoder, m, x, tokens, dtype, 1);
    const std::vector<float> many = prompt(decoder, m, x, tokens, dtype, 1);
    if (isa == TL_PORTABLE) portable = one;
    good = good && !many.empty() && (!m.exact || distance(many, portable) < 0.1);
    // Rounding to 8 bits may fall to the other side; everything else is float32.
    good = good && !one.empty() && (!m.exact || distance(one, portable) < 0.1);
    std::atomic<int> wrong{0};
    std::vector<std::thread> callers;
    for (int threads = 1; threads < 4; threads++)
      callers.emplace_back([&, threads] {
        wrong += decode(decoder, m, x, tokens, dtype, threads) != one;
        wrong += prompt(decoder, m, x, tokens, dtype, threads) != many;
      });
    for (std::thread &c : callers) c.join();
    good = good && wrong == 0;
    tl_decoder_free(decoder);
  }
  return good;
}

}  // namespace

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 60;
  int failures = 0;
  for (int i = 0; i < rounds; i++) {
    Model m;
    m.packed.reserve(1 << 10), m.floats.reserve(1 << 10);  // the decoder keeps addresses
    fill(m);
    const int64_t tokens = i % 10 == 0 ? 520 : between(1, 12);  // several runs of tokens in attention now and then
    if (float_products_agree() && check(m, between(0, 1) ? TL_FLOAT32 : TL_BFLOAT16, tokens)) continue;
    const tl_decoder_shape &s = m.shape;
    std::printf("failed: hidden %d heads %d/%d dim %d rotary %d tokens %d\n", int(s.hidden), int(s.heads),
                int(s.kv_heads), int(s.head_dim), int(s.rotary), int(tokens));
    failures++;
  }
  std::printf("%d decoders: %d failed\n", rounds, failures);
  return failures != 0;
}
