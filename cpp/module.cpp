// SPDX-License-Identifier: BSD-3-Clause
//
// sdgp._C: facts about the build. Importing it loads libsdgp.so, and with it the ops.
#include <pybind11/pybind11.h>

#include "kernels/kernels.h"
#include "sdgp/build_info.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts of sdgp; importing it registers the ops in torch.ops.sdgp.";
  module.attr("version") = SDGP_VERSION;
  module.attr("max_group_size") = sdgp::kMaxGroupSize;
  pybind11::list methods;
  for (const auto& known : sdgp::kMethods) methods.append(known.name);
  module.attr("methods") = pybind11::tuple(methods);
  module.def("isa", &sdgp_isa, "Name of the instruction set whose kernels this process uses.");
}
