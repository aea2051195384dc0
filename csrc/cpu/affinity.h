// The CPUs that the threads of a team may run on.
#pragma once

#include <vector>

namespace cnk::cpu {

using CpuMask = std::vector<int>;  // numbers of CPUs

// Thread r of the team that parallel() gives for masks.size() threads may from now on run on the CPUs of
// masks[r] only; returns what they had. Throws std::runtime_error, with nothing changed, where the team comes
// out smaller, the system refuses a mask, or there is no such call (it is Linux's).
//
// The masks belong to the threads: to undo, call from the same thread, with as many masks, before the runtime
// replaces its threads (OpenMP's does when it is asked for a smaller team, and starts new ones later with the
// mask of their creator).
std::vector<CpuMask> set_affinity(const std::vector<CpuMask>& masks);

}  // namespace cnk::cpu
