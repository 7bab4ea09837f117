# SPDX-License-Identifier: BSD-3-Clause
#
# find_package(sdgp CONFIG) defines sdgp::sdgp, and sdgp::sdgp_cuda if it was built. It does not need Python. It needs
# LibTorch first: call find_package(Torch), or set TORCH_LIBRARIES to a replacement.
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
