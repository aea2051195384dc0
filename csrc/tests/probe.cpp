// Compiled once per instruction set, like the kernels, and with the same rule: no standard library.

#include "probe.h"

#include "cpu/platform/vec.h"

namespace cnk::cpu::CNK_ISA {

namespace {

void load_array(DType dtype, const void* x, float* y, int64_t count) {
  with_type(dtype, [&](auto type) {
    for (int64_t i = 0; i < count; i += kLanes) store(y + i, load(static_cast<const decltype(type)*>(x) + i));
  });
}

void store_array(DType dtype, const float* x, void* y, int64_t count) {
  with_type(dtype, [&](auto type) {
    for (int64_t i = 0; i < count; i += kLanes) store(static_cast<decltype(type)*>(y) + i, load(x + i));
  });
}

void load_some(DType dtype, const void* x, int64_t n, float* y) {
  with_type(dtype, [&](auto type) { store(y, load_partial(static_cast<const decltype(type)*>(x), n)); });
}

void store_some(DType dtype, const float* x, int64_t n, void* y) {
  with_type(dtype, [&](auto type) { store_partial(static_cast<decltype(type)*>(y), load(x), n); });
}

#if defined(__AMX_BF16__) || defined(__AMXBF16__)
struct TileConfiguration {
  uint8_t bytes[64];
};
void set_tiles(const uint8_t* configuration) {
  asm volatile("ldtilecfg %0" ::"m"(*reinterpret_cast<const TileConfiguration*>(configuration)));
}
void get_tiles(uint8_t* configuration) {
  asm volatile("sttilecfg %0" : "=m"(*reinterpret_cast<TileConfiguration*>(configuration)));
}
#else
constexpr void (*set_tiles)(const uint8_t*) = nullptr;
constexpr void (*get_tiles)(uint8_t*) = nullptr;
#endif

}  // namespace

extern const test::Probe kProbe = {kLanes,     load_array, store_array, load_some,
                                   store_some, set_tiles,  get_tiles};

}  // namespace cnk::cpu::CNK_ISA
