// Each way is a function of its own with its own target, so one file serves every instruction set.
// Accumulators are named variables: compilers spill arrays of them. Their starts differ, or equal
// chains would be merged into one; SEEN hides an operand's value, or products of constants would
// leave the loop.
#include "probe.h"

#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moeserve {
namespace {

using Clock = std::chrono::steady_clock;

// Work of one call between two looks at the clock: a fraction of a millisecond.
constexpr int64_t kPiece = 2 << 20;
constexpr int64_t kSteps = 1 << 15;
constexpr int64_t kHugePage = 2 << 20;
constexpr int64_t kAhead = 2048;

using Walk = uint64_t (*)(const char* data, int64_t bytes);
using Burn = double (*)(int64_t steps);

struct Way {
  const char* what;
  const char* name;
  bool (*runs_here)();
  Walk walk;             // "read" has this,
  Burn burn;             // the others this and
  int64_t ops_per_step;  // how many operations one step is
};

bool anywhere() { return true; }

#define EIGHT(X) X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7)
#define TWELVE(X) EIGHT(X) X(8) X(9) X(10) X(11)
#define SIXTEEN(X) TWELVE(X) X(12) X(13) X(14) X(15)

using Words = uint64_t __attribute__((vector_size(16)));
using Floats = float __attribute__((vector_size(16)));

uint64_t walk_portable(const char* data, int64_t bytes) {
  Words a{}, b{}, c{}, d{};
  for (int64_t i = 0; i + 64 <= bytes; i += 64) {
    Words x[4];
    std::memcpy(x, data + i, 64);
    a ^= x[0];
    b ^= x[1];
    c ^= x[2];
    d ^= x[3];
  }
  a ^= b ^ c ^ d;
  return a[0] ^ a[1];
}

double burn_fp32_portable(int64_t steps) {
  Floats x{1e-3f, 2e-3f, 3e-3f, 4e-3f}, y{1e-3f, 1e-3f, 1e-3f, 1e-3f};
#define START(i) Floats s##i = {i, i, i, i};
#define STEP(i) s##i += x * y;
#define ADD(i) total += s##i;
  EIGHT(START)
  for (int64_t n = 0; n < steps; ++n) {
    asm volatile("" : "+m"(x));
    EIGHT(STEP)
  }
  Floats total{};
  EIGHT(ADD)
#undef START
#undef STEP
#undef ADD
  return static_cast<double>(total[0] + total[1] + total[2] + total[3]);
}

double burn_int8_portable(int64_t steps) {
  int8_t x[256], y[256];
  for (int i = 0; i < 256; ++i) x[i] = static_cast<int8_t>(i), y[i] = static_cast<int8_t>(3 * i);
  uint32_t total = 0;
  for (int64_t n = 0; n < steps; ++n) {
    asm volatile("" : "+m"(x));
    int32_t sum = 0;
    for (int i = 0; i < 256; ++i) sum += x[i] * y[i];
    total += static_cast<uint32_t>(sum);
  }
  return total;
}

#if defined(__x86_64__)
#define TARGET(features) __attribute__((target(features)))
#define SEEN(x) asm volatile("" : "+v"(x));
#define SEEN_VEX(x) asm volatile("" : "+x"(x));

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }

TARGET("avx2") uint64_t walk_avx2(const char* data, int64_t bytes) {
#define START(i) __m256i s##i = _mm256_setzero_si256();
#define STEP(i) \
  s##i = _mm256_xor_si256(s##i, _mm256_load_si256(reinterpret_cast<const __m256i*>(at + i * 32)));
  EIGHT(START)
  for (const char *at = data, *end = data + bytes; at + 256 <= end; at += 256) {
    for (int i = 0; i < 256; i += 64) _mm_prefetch(at + kAhead + i, _MM_HINT_T0);
    EIGHT(STEP)
  }
  s0 = _mm256_xor_si256(_mm256_xor_si256(s0, s1), _mm256_xor_si256(s2, s3));
  s4 = _mm256_xor_si256(_mm256_xor_si256(s4, s5), _mm256_xor_si256(s6, s7));
  s0 = _mm256_xor_si256(s0, s4);
#undef START
#undef STEP
  return static_cast<uint64_t>(_mm256_extract_epi64(s0, 0) ^ _mm256_extract_epi64(s0, 3));
}

template <bool kPrefetch>
TARGET("avx512f") uint64_t walk_avx512(const char* data, int64_t bytes) {
#define START(i) __m512i s##i = _mm512_setzero_si512();
#define STEP(i) s##i = _mm512_xor_si512(s##i, _mm512_load_si512(at + i * 64));
  EIGHT(START)
  for (const char *at = data, *end = data + bytes; at + 512 <= end; at += 512) {
    for (int i = 0; kPrefetch && i < 512; i += 64) _mm_prefetch(at + kAhead + i, _MM_HINT_T0);
    EIGHT(STEP)
  }
  s0 = _mm512_xor_si512(_mm512_xor_si512(s0, s1), _mm512_xor_si512(s2, s3));
  s4 = _mm512_xor_si512(_mm512_xor_si512(s4, s5), _mm512_xor_si512(s6, s7));
#undef START
#undef STEP
  return static_cast<uint64_t>(_mm512_reduce_add_epi64(_mm512_xor_si512(s0, s4)));
}

TARGET("avx2,fma") double burn_fp32_avx2(int64_t steps) {
  __m256 x = _mm256_set1_ps(1e-3f), y = _mm256_set1_ps(2e-3f);
#define START(i) __m256 s##i = _mm256_set1_ps(i);
#define STEP(i) s##i = _mm256_fmadd_ps(x, y, s##i);
#define ADD(i) total = _mm256_add_ps(total, s##i);
  TWELVE(START)
  for (int64_t n = 0; n < steps; ++n) {
    SEEN_VEX(x)
    TWELVE(STEP)
  }
  __m256 total = _mm256_setzero_ps();
  TWELVE(ADD)
#undef START
#undef STEP
#undef ADD
  return static_cast<double>(_mm256_cvtss_f32(total));
}

TARGET("avx512f") double burn_fp32_avx512(int64_t steps) {
  __m512 x = _mm512_set1_ps(1e-3f), y = _mm512_set1_ps(2e-3f);
#define START(i) __m512 s##i = _mm512_set1_ps(i);
#define STEP(i) s##i = _mm512_fmadd_ps(x, y, s##i);
#define ADD(i) total = _mm512_add_ps(total, s##i);
  SIXTEEN(START)
  for (int64_t n = 0; n < steps; ++n) {
    SEEN(x)
    SIXTEEN(STEP)
  }
  __m512 total = _mm512_setzero_ps();
  SIXTEEN(ADD)
#undef START
#undef STEP
#undef ADD
  return static_cast<double>(_mm512_reduce_add_ps(total));
}

TARGET("avx512f,avx512bw,avx512bf16") double burn_bf16_avx512(int64_t steps) {
  auto x = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3a83));
  auto y = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3b03));
#define START(i) __m512 s##i = _mm512_set1_ps(i);
#define STEP(i) s##i = _mm512_dpbf16_ps(s##i, x, y);
#define ADD(i) total = _mm512_add_ps(total, s##i);
  SIXTEEN(START)
  for (int64_t n = 0; n < steps; ++n) {
    SEEN(x)
    SIXTEEN(STEP)
  }
  __m512 total = _mm512_setzero_ps();
  SIXTEEN(ADD)
#undef START
#undef STEP
#undef ADD
  return static_cast<double>(_mm512_reduce_add_ps(total));
}

TARGET("avx512f,avx512bw,avx512vnni") double burn_int8_avx512(int64_t steps) {
  __m512i x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(-5);
#define START(i) __m512i s##i = _mm512_set1_epi32(i);
#define STEP(i) s##i = _mm512_dpbusd_epi32(s##i, x, y);
#define ADD(i) total = _mm512_add_epi32(total, s##i);
  SIXTEEN(START)
  for (int64_t n = 0; n < steps; ++n) {
    SEEN(x)
    SIXTEEN(STEP)
  }
  __m512i total = _mm512_setzero_si512();
  SIXTEEN(ADD)
#undef START
#undef STEP
#undef ADD
  return _mm512_reduce_add_epi32(total);
}

TARGET("avx2,avxvnni") double burn_int8_avxvnni(int64_t steps) {
  __m256i x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(-5);
#define START(i) __m256i s##i = _mm256_set1_epi32(i);
#define STEP(i) s##i = _mm256_dpbusd_avx_epi32(s##i, x, y);
#define ADD(i) total = _mm256_add_epi32(total, s##i);
  TWELVE(START)
  for (int64_t n = 0; n < steps; ++n) {
    SEEN_VEX(x)
    TWELVE(STEP)
  }
  __m256i total = _mm256_setzero_si256();
  TWELVE(ADD)
#undef START
#undef STEP
#undef ADD
  return _mm256_extract_epi32(total, 0);
}

// Exact without VNNI: codes widened to 16 bits, which rows of a tile share, then PMADDWD.
TARGET("avx2") double burn_int8_avx2(int64_t steps) {
  __m256i x = _mm256_set1_epi16(3), y = _mm256_set1_epi16(-5);
#define START(i) __m256i s##i = _mm256_set1_epi32(i);
#define STEP(i)                                           \
  {                                                       \
    SEEN_VEX(x)                                           \
    s##i = _mm256_add_epi32(s##i, _mm256_madd_epi16(x, y)); \
  }
#define ADD(i) total = _mm256_add_epi32(total, s##i);
  TWELVE(START)
  for (int64_t n = 0; n < steps; ++n) {
    TWELVE(STEP)
  }
  __m256i total = _mm256_setzero_si256();
  TWELVE(ADD)
#undef START
#undef STEP
#undef ADD
  return _mm256_extract_epi32(total, 0);
}
#endif

// Best first within each kind. Without an instruction for it, a bf16 product is an fp32 one: the
// widening of weights is shared by the rows of a tile.
const Way kWays[] = {
#if defined(__x86_64__)
    {"read", "avx512", has_avx512, walk_avx512<false>, nullptr, 0},
    {"read", "avx512_prefetch", has_avx512, walk_avx512<true>, nullptr, 0},
    {"read", "avx2", has_avx2, walk_avx2, nullptr, 0},
    {"int8", "avx512_vnni", has_avx512_vnni, nullptr, burn_int8_avx512, 16 * 128},
    {"int8", "avx_vnni", has_avx_vnni, nullptr, burn_int8_avxvnni, 12 * 64},
    {"int8", "avx2", has_avx2, nullptr, burn_int8_avx2, 12 * 32},
    {"bf16", "avx512_bf16", has_avx512_bf16, nullptr, burn_bf16_avx512, 16 * 64},
    {"bf16", "avx512", has_avx512, nullptr, burn_fp32_avx512, 16 * 32},
    {"bf16", "avx2", has_avx2, nullptr, burn_fp32_avx2, 12 * 16},
    {"fp32", "avx512", has_avx512, nullptr, burn_fp32_avx512, 16 * 32},
    {"fp32", "avx2", has_avx2, nullptr, burn_fp32_avx2, 12 * 16},
#endif
    {"read", "portable", anywhere, walk_portable, nullptr, 0},
    {"int8", "portable", anywhere, nullptr, burn_int8_portable, 256 * 2},
    {"bf16", "portable", anywhere, nullptr, burn_fp32_portable, 8 * 8},
    {"fp32", "portable", anywhere, nullptr, burn_fp32_portable, 8 * 8},
};

const Way& find(const std::string& what, const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Way& way : kWays)
    if (what == way.what && name == way.name && way.runs_here()) return way;
  throw std::invalid_argument("'" + name + "' is not one of _cpu.probe_ways('" + what + "')");
}

// Memory that nobody shares, in huge pages where the system gives them, touched by its owner.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
    size_ = static_cast<size_t>(bytes_ + kHugePage);
    base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    const auto first = (reinterpret_cast<uintptr_t>(base_) + kHugePage - 1) / kHugePage * kHugePage;
    data_ = reinterpret_cast<char*>(first);
#if defined(MADV_HUGEPAGE)
    madvise(data_, static_cast<size_t>(bytes_), MADV_HUGEPAGE);
#endif
    std::memset(data_, 1, static_cast<size_t>(bytes_));
  }
  ~Memory() { munmap(base_, size_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  const char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  int64_t bytes_;
  size_t size_;
  void* base_;
  char* data_;
};

// All threads begin a round together: a lone one would have memory and turbo clock to itself.
class Start {
 public:
  explicit Start(int threads) : threads_(threads) {}
  void wait(int round) {
    arrived_.fetch_add(1);
    while (arrived_.load() < (round + 1) * threads_) std::this_thread::yield();
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
};

template <class Call>
double rate(double seconds, const Call& units_of_one_call) {
  const auto begin = Clock::now();
  double units = 0, elapsed = 0;
  do {
    units += static_cast<double>(units_of_one_call());
    elapsed = std::chrono::duration<double>(Clock::now() - begin).count();
  } while (elapsed < seconds);
  return units / elapsed;
}

void work(const Way& way, Start& start, double seconds, int64_t bytes, std::vector<double>& rates) {
  volatile double sink = 0;
  if (way.burn) {
    for (size_t r = 0; r < rates.size(); ++r) {
      start.wait(static_cast<int>(r));
      rates[r] = rate(seconds, [&] {
        sink = sink + way.burn(kSteps);
        return kSteps * way.ops_per_step;
      });
    }
    return;
  }
  const Memory memory(bytes);
  int64_t at = 0;
  for (size_t r = 0; r < rates.size(); ++r) {
    start.wait(static_cast<int>(r));
    rates[r] = rate(seconds, [&] {
      const int64_t piece = at + kPiece <= memory.bytes() ? kPiece : memory.bytes() - at;
      sink = sink + static_cast<double>(way.walk(memory.data() + at, piece));
      at = at + piece < memory.bytes() ? at + piece : 0;
      return piece;
    });
  }
}

}  // namespace

std::vector<std::string> probe_ways(const std::string& what) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  std::vector<std::string> names;
  for (const Way& way : kWays)
    if (what == way.what && way.runs_here()) names.push_back(way.name);
  if (names.empty()) throw std::invalid_argument("'" + what + "' is not read, int8, bf16 or fp32");
  return names;
}

std::vector<double> probe(const std::string& what, const std::string& name, int threads, int rounds,
                          double seconds, int64_t bytes) {
  if (threads < 1 || rounds < 1 || bytes < threads)
    throw std::invalid_argument("threads, rounds and bytes of each thread must be at least 1");
  const Way& way = find(what, name);
  std::vector<std::vector<double>> rates(static_cast<size_t>(threads));
  Start start(threads);
  std::vector<std::thread> others;
  for (auto& of_one : rates) of_one.resize(static_cast<size_t>(rounds));
  const auto run = [&](int i) { work(way, start, seconds, bytes / threads, rates[size_t(i)]); };
  for (int i = 1; i < threads; ++i) others.emplace_back(run, i);
  run(0);
  for (std::thread& other : others) other.join();
  std::vector<double> together(static_cast<size_t>(rounds));
  for (const auto& of_one : rates)
    for (size_t r = 0; r < together.size(); ++r) together[r] += of_one[r];
  return together;
}

}  // namespace moeserve
