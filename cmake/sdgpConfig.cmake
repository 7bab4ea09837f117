# SPDX-License-Identifier: BSD-3-Clause
#
# find_package(sdgp CONFIG) defines sdgp::sdgp. Link it beside your own LibTorch (>= 2.10); no Python is needed.
include("${CMAKE_CURRENT_LIST_DIR}/sdgpTargets.cmake")
