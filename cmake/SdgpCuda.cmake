# SPDX-License-Identifier: BSD-3-Clause
#
# Defines the target sdgp_cuda. It needs only nvcc, the CUDA runtime and any build of torch, but no other CUDA library.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  # Code for Ampere (Ada runs it too), Hopper and both Blackwells. The PTX of the last one is for later GPUs.
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90-real 100-real 120)
endif()
enable_language(CUDA)

# libsdgp_cuda needs only one function of libtorch_cuda. A stand-in with that library's name makes it possible to build
# with a CPU-only torch. At run time torch has already loaded the real library.
file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stand_in.cpp"
     "extern \"C\" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n")
add_library(sdgp_torch_cuda SHARED "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stand_in.cpp")
set_target_properties(sdgp_torch_cuda PROPERTIES OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY
                                                                        "${CMAKE_CURRENT_BINARY_DIR}/stand_in")

add_library(
  sdgp_cuda SHARED
  cpp/ops/prune_args.cpp
  cuda/build_info.cu
  cuda/kernels/cuda_kernels.cpp
  cuda/kernels/pack_24_bfloat16.cu
  cuda/kernels/pack_24_float16.cu
  cuda/kernels/prune_nm_bfloat16.cu
  cuda/kernels/prune_nm_float16.cu
  cuda/kernels/prune_nm_float32.cu
  cuda/kernels/prune_nm_float64.cu
  cuda/ops/pack_24.cpp
  cuda/ops/prune_cuda.cpp
  cuda/ops/prune_nm.cpp)
add_dependencies(sdgp_cuda sdgp_torch_cuda)
target_link_libraries(sdgp_cuda PRIVATE stdc++ TorchStable::torch_cpu "$<TARGET_FILE:sdgp_torch_cuda>"
                                        ${CMAKE_DL_LIBS})
target_compile_features(sdgp_cuda PRIVATE cxx_std_20 cuda_std_20)
target_compile_definitions(sdgp_cuda PRIVATE USE_CUDA)
set_target_properties(
  sdgp_cuda
  PROPERTIES CUDA_RUNTIME_LIBRARY Static
             CXX_VISIBILITY_PRESET hidden
             CUDA_VISIBILITY_PRESET hidden
             VISIBILITY_INLINES_HIDDEN ON
             INSTALL_RPATH ""
             BUILD_WITH_INSTALL_RPATH ON)
target_link_options(sdgp_cuda INTERFACE "LINKER:--no-as-needed")
# Multiply and add are not contracted, as on the CPU: random and mvue must select the same positions.
set(SDGP_CUDA_FLAGS -fmad=false --expt-relaxed-constexpr --compress-mode=size "-Xcompiler=-Wall,-Wextra,-Wno-unknown-pragmas")
if(SDGP_WERROR)
  list(APPEND SDGP_CUDA_FLAGS -Werror=all-warnings)
  target_compile_options(sdgp_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CXX>:-Werror>")
endif()
target_compile_options(sdgp_cuda PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${SDGP_CUDA_FLAGS}>"
                                         "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-ffp-contract=off>")
