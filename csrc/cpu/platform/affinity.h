// The CPUs that the threads of a team may run on.
#pragma once

#include <vector>

namespace cnk::cpu {

using CpuMask = std::vector<int>;  // numbers of CPUs

// From now on thread r of the team that parallel() starts for masks.size() threads may only run on the CPUs
// of masks[r]. Returns the masks that the threads had. Throws std::runtime_error and changes nothing if the
// team is smaller, the system refuses a mask, or there is no such system call (it exists on Linux only).
//
// The masks belong to the threads. To undo, call from the same thread, with as many masks, before the runtime
// replaces its threads. (OpenMP's runtime replaces them after a request for a smaller team: it starts new
// threads later, with the mask of the thread that creates them.)
std::vector<CpuMask> set_affinity(const std::vector<CpuMask>& masks);

}  // namespace cnk::cpu
