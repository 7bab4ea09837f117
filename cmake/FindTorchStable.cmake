# SPDX-License-Identifier: BSD-3-Clause
#
# Finds what a library on LibTorch's stable ABI needs: the stable headers, libtorch_cpu and libc10. It does not use
# find_package(Torch), which requires the whole CUDA toolkit if torch is a CUDA build. It looks in TorchStable_ROOT or,
# if that is not set, in the torch that the found Python would import.
#
# Defines TorchStable::torch_cpu and TorchStable_VERSION.
if(NOT TorchStable_ROOT)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE TorchStable_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_path(TorchStable_INCLUDE_DIR torch/csrc/stable/library.h HINTS "${TorchStable_ROOT}/include" NO_DEFAULT_PATH)
find_library(TorchStable_torch_cpu torch_cpu HINTS "${TorchStable_ROOT}/lib" NO_DEFAULT_PATH)
find_library(TorchStable_c10 c10 HINTS "${TorchStable_ROOT}/lib" NO_DEFAULT_PATH)

foreach(header torch/headeronly/version.h torch/csrc/api/include/torch/version.h) # torch 2.8 has only the second
  if(NOT TorchStable_VERSION AND EXISTS "${TorchStable_INCLUDE_DIR}/${header}")
    file(STRINGS "${TorchStable_INCLUDE_DIR}/${header}" lines REGEX "^#define TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
    string(REGEX MATCHALL "[0-9]+" numbers "${lines}")
    list(JOIN numbers "." TorchStable_VERSION)
  endif()
endforeach()

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchStable
  REQUIRED_VARS TorchStable_torch_cpu TorchStable_c10 TorchStable_INCLUDE_DIR
  VERSION_VAR TorchStable_VERSION
  REASON_FAILURE_MESSAGE "sdgp builds against torch >= 2.10: pip install --upgrade 'torch>=2.10'")

if(TorchStable_FOUND AND NOT TARGET TorchStable::torch_cpu)
  add_library(TorchStable::torch_cpu INTERFACE IMPORTED)
  target_include_directories(TorchStable::torch_cpu SYSTEM INTERFACE "${TorchStable_INCLUDE_DIR}")
  target_link_libraries(TorchStable::torch_cpu INTERFACE "${TorchStable_torch_cpu}" "${TorchStable_c10}")
  target_compile_options(TorchStable::torch_cpu INTERFACE "$<$<AND:$<COMPILE_LANGUAGE:CXX>,$<NOT:$<CONFIG:Debug>>>:-ffile-prefix-map=${TorchStable_INCLUDE_DIR}=torch>")
  # The oldest torch that can run the library.
  target_compile_definitions(TorchStable::torch_cpu INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
endif()
