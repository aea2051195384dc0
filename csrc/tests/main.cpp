// Entry of every test program: prints what runs, then calls doctest.

#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>

#include "support.h"

int main(int argc, char** argv) {
  std::printf("instruction sets:");
  for (int i = 0; i < cnk::cpu::kIsaCount; ++i) {
    const cnk::cpu::Isa isa = cnk::cpu::Isa(i);
    const char* note = !cnk::cpu::isa_ops(isa)         ? " (not in this build)"
                       : !cnk::cpu::isa_supported(isa) ? " (not on this machine)"
                                                       : "";
    std::printf(" %s%s", cnk::cpu::isa_name(isa), note);
  }
  std::printf("; threads of: %s\n", cnk::cpu::parallel_runtime());
  std::fflush(stdout);
  return doctest::Context(argc, argv).run();
}
