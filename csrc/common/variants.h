// What a block may have in place of LayerNorm and the exact GELU, in the order of
// convnext_kernels/variants.py, which has the formulas and their sources.
#pragma once

namespace cnk {

enum class Norm : int { kLayer, kRms, kSimple };
constexpr const char* kNormNames[] = {"layer", "rms", "simple"};
constexpr int kNorms = sizeof kNormNames / sizeof *kNormNames;

enum class Activation : int { kGelu, kGeluTanh, kQuickGelu, kSilu, kMish, kRelu, kRelu6, kHardswish };
constexpr const char* kActivationNames[] = {"gelu", "gelu_tanh", "quick_gelu", "silu",
                                            "mish", "relu",      "relu6",      "hardswish"};
constexpr int kActivations = sizeof kActivationNames / sizeof *kActivationNames;

}  // namespace cnk
