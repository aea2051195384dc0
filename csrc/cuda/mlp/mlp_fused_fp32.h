// The inverted bottleneck of mlp_fused.h with fp32 products, IEEE and not TF32, on the fp32 lanes.
#pragma once

#include "cuda/mlp/mlp_fused.h"

namespace cnk::cuda {

// `tile` is a multiple of 16, at most 128; w1, w2 and u are fp32.
void mlp_fused_fp32(const Context& context, const MlpFusedArgs& args);

}  // namespace cnk::cuda
