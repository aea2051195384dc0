// From an instruction set to its table of kernels. CNK_SETS: CNK_SET(name) for each set that the build compiled.

#include <cstring>

#include "cpu/ops.h"

namespace cnk::cpu {

#define CNK_SET(name)       \
  namespace name {          \
  extern const IsaOps kOps; \
  }
CNK_SETS
#undef CNK_SET

const IsaOps* isa_ops(Isa isa) {
#define CNK_SET(name) \
  if (!std::strcmp(isa_name(isa), #name)) return &name::kOps;
  CNK_SETS
#undef CNK_SET
  return nullptr;
}

}  // namespace cnk::cpu
