# SPDX-License-Identifier: BSD-3-Clause
#
# find_package(sdgp CONFIG) defines sdgp::sdgp, and sdgp::sdgp_cuda where it was built. No Python is needed, but LibTorch
# first: find_package(Torch), or TORCH_LIBRARIES set to what else stands for it.
if(NOT Torch_FOUND AND NOT TORCH_LIBRARIES)
  set(sdgp_FOUND FALSE)
  set(sdgp_NOT_FOUND_MESSAGE
      "sdgp needs LibTorch >= 2.10, found none: call find_package(Torch REQUIRED) before find_package(sdgp)")
  return()
endif()
if(Torch_VERSION AND Torch_VERSION VERSION_LESS 2.10)
  set(sdgp_FOUND FALSE)
  set(sdgp_NOT_FOUND_MESSAGE "sdgp needs LibTorch >= 2.10, found ${Torch_VERSION}")
  return()
endif()
include("${CMAKE_CURRENT_LIST_DIR}/sdgpTargets.cmake")
