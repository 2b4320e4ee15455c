// SPDX-License-Identifier: Apache-2.0
#include "dispatch.hpp"

#include <stdlib.h>

#include <atomic>
#include <stdexcept>

namespace fastloss {
namespace {

struct Entry {
  const char* name;
  const Kernels* kernels;  // null: not compiled into this build
  bool supported;
};

std::vector<Entry> entries() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // no CPU has AVX2 without F16C
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  const bool avx2 = false, avx512 = false;
#endif
#if defined(FASTLOSS_HAVE_AVX2)
  const Kernels* avx2_kernels = &kernels_avx2;
#else
  const Kernels* avx2_kernels = nullptr;
#endif
#if defined(FASTLOSS_HAVE_AVX512)
  const Kernels* avx512_kernels = &kernels_avx512;
#else
  const Kernels* avx512_kernels = nullptr;
#endif
#if defined(FASTLOSS_HAVE_AVX512BF16)
  const Kernels* avx512bf16_kernels = &kernels_avx512bf16;
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
#else
  const Kernels* avx512bf16_kernels = nullptr;
  const bool avx512bf16 = false;
#endif
#if defined(FASTLOSS_HAVE_NEON)
  const Kernels* neon_kernels = &kernels_neon;
#else
  const Kernels* neon_kernels = nullptr;
#endif
  return {{"scalar", &kernels_scalar, true},
          {"avx2", avx2_kernels, avx2},
          {"avx512", avx512_kernels, avx512},
          {"avx512bf16", avx512bf16_kernels, avx512bf16},
          {"neon", neon_kernels, neon_kernels != nullptr}};
}

std::string joined(const std::vector<std::string>& names) {
  std::string text;
  for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

const Kernels* find(const std::string& name, const std::string& source) {
  bool known = false;
  for (const Entry& entry : entries()) {
    if (name != entry.name) continue;
    if (entry.kernels && entry.supported) return entry.kernels;
    known = true;
  }
  throw std::invalid_argument(
      source + " = '" + name + "' is " +
      (known ? "not available here" : "not a known instruction set (scalar, avx2, avx512, avx512bf16, neon)") +
      "; available: " + joined(available_isas()));
}

const Kernels* choose() {
  const char* wanted = getenv("FASTLOSS_ISA");
  return wanted && *wanted ? find(wanted, "FASTLOSS_ISA") : find(available_isas().back(), "isa");
}

std::atomic<const Kernels*> current{nullptr};

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : entries()) {
    if (entry.kernels && entry.supported) names.emplace_back(entry.name);
  }
  return names;
}

const Kernels& kernels() {
  const Kernels* in_use = current;
  if (in_use == nullptr) {
    in_use = choose();
    current = in_use;
  }
  return *in_use;
}

void set_isa(const std::string& name) { current = find(name, "isa"); }

}  // namespace fastloss
