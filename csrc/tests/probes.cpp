// From an instruction set to its probe, and to the code with emulated instructions. CMake lists the sets of this build.

#include <map>
#include <string>

#include "probe.h"

namespace cnk::cpu {

#define CNK_PROBE(set)             \
  namespace set {                  \
  extern const IsaOps kOps;        \
  extern const test::Probe kProbe; \
  }
#include "probes.inc"
#undef CNK_PROBE

}  // namespace cnk::cpu

namespace cnk::test {

namespace {

Emulated compiled(const std::string& set) {
  static const std::map<std::string, Emulated> all = {
#define CNK_PROBE(set) {#set, {&cpu::set::kOps, &cpu::set::kProbe}},
#include "probes.inc"
#undef CNK_PROBE
  };
  const auto found = all.find(set);
  return found == all.end() ? Emulated{nullptr, nullptr} : found->second;
}

}  // namespace

const Probe* isa_probe(cpu::Isa isa) { return compiled(cpu::isa_name(isa)).probe; }

Emulated isa_emulated(cpu::Isa isa) { return compiled(std::string(cpu::isa_name(isa)) + "_emulated"); }

}  // namespace cnk::test
