// From an instruction set to its probe, as cpu/dispatch.cpp does it for the kernels.

#include <string>

#include "probe.h"

namespace cnk::cpu {

#define CNK_SET(name)              \
  namespace name {                 \
  extern const IsaOps kOps;        \
  extern const test::Probe kProbe; \
  }
CNK_SETS
#undef CNK_SET

}  // namespace cnk::cpu

namespace cnk::test {

namespace {

Emulated found(const std::string& set) {
#define CNK_SET(name) \
  if (set == #name) return {&cpu::name::kOps, &cpu::name::kProbe};
  CNK_SETS
#undef CNK_SET
  return {nullptr, nullptr};
}

}  // namespace

const Probe* isa_probe(cpu::Isa isa) { return found(cpu::isa_name(isa)).probe; }

Emulated isa_emulated(cpu::Isa isa) { return found(std::string(cpu::isa_name(isa)) + "_emulated"); }

}  // namespace cnk::test
