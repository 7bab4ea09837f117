// SPDX-License-Identifier: BSD-3-Clause
//
// The module sdgp._C with facts about the build. Importing it loads libsdgp.so, which registers the ops.
#include <pybind11/pybind11.h>

#include "kernels/layout_24.h"
#include "sdgp/build_info.h"

namespace {

// Returns the names of the table's rows for which `keep` returns true.
template <class Table, class Keep>
pybind11::tuple names(const Table& table, const Keep& keep) {
  pybind11::list found;
  for (const auto& row : table) {
    if (keep(row)) found.append(row.name);
  }
  return pybind11::tuple(found);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  const auto all = [](const auto&) { return true; };
  module.doc() = "Build facts of sdgp; importing it registers the ops in torch.ops.sdgp.";
  module.attr("version") = SDGP_VERSION;
  module.attr("max_group_size") = sdgp::kMaxGroupSize;
  module.attr("dtypes") = names(sdgp::kDTypes, all);
  module.attr("methods") = names(sdgp::kMethods, all);
  module.attr("methods_that_draw") = names(sdgp::kMethods, [](const auto& method) { return method.draws; });
  module.attr("methods_on_cuda") = names(sdgp::kMethods, [](const auto& method) { return method.fixed; });
  module.attr("methods_unbiased") = names(sdgp::kMethods, [](const auto& method) { return method.unbiased; });
  module.attr("methods_by_group") = names(sdgp::kMethods, [](const auto& method) { return method.by_group; });
  module.attr("tile_24") = pybind11::make_tuple(sdgp::kTileRows, sdgp::kTileCols);
  module.attr("layouts_24") = names(sdgp::kLayouts24, all);
  module.def("isa", &sdgp_isa, "Name of the instruction set whose kernels this process uses.");
}
