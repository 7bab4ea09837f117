// SPDX-License-Identifier: BSD-3-Clause
//
// Runs the CUDA kernels on the host, with launches, barriers and shuffles, through the stand-in for CUDA's runtime.
// tests/test_cuda_on_host.py compares this shared library with the ops on the CPU. A kernel cannot read or write
// outside the tensors, because they are copied between guard pages.
#include <cstring>

#include "../../cuda/driver.h"
#include "../../cuda/kernels/cuda_kernels.cpp"
#include "../../cuda/kernels/pack_24_bfloat16.cu"
#include "../../cuda/kernels/pack_24_float16.cu"
#include "../../cuda/kernels/prune_nm_bfloat16.cu"
#include "../../cuda/kernels/prune_nm_float16.cu"
#include "../../cuda/kernels/prune_nm_float32.cu"
#include "../../cuda/kernels/prune_nm_float64.cu"
#include "guarded.h"

namespace sdgp::cuda {
namespace {

constexpr int64_t kAlignment = 16;  // alignment of the widest access
constexpr char kPoison = static_cast<char>(cuda_stand_in::kPoison);

// A copy of a tensor's memory that ends at a guard page, up to a gap that keeps its alignment. All bytes around the
// copy are poisoned and must stay so.
class Copy {
 public:
  Copy(void* memory, int64_t bytes)
      : original_(static_cast<char*>(memory)), bytes_(bytes), room_(bytes + kAlignment, true) {
    std::memset(room_.data, kPoison, static_cast<size_t>(bytes + kAlignment));
    const auto behind =
        (reinterpret_cast<uintptr_t>(room_.data) + kAlignment - reinterpret_cast<uintptr_t>(original_)) % kAlignment;
    begin_ = room_.data + kAlignment - behind;
    std::memcpy(begin_, original_, static_cast<size_t>(bytes));
  }

  void* at(const void* original) { return begin_ + (static_cast<const char*>(original) - original_); }

  void copy_back() {
    for (char* p = room_.data; p < room_.data + bytes_ + kAlignment; ++p) {
      if ((p < begin_ || p >= begin_ + bytes_) && *p != kPoison) cuda_stand_in::fail("a write beside the tensor");
    }
    std::memcpy(original_, begin_, static_cast<size_t>(bytes_));
  }

 private:
  char* original_;
  int64_t bytes_;
  test::Guarded<char> room_;
  char* begin_;
};

// Poisoned memory that a kernel may write to.
struct Room : test::Guarded<char> {
  explicit Room(int64_t bytes) : Guarded((bytes + 7) / 8 * 8, true) {
    std::memset(data, kPoison, static_cast<size_t>((bytes + 7) / 8 * 8));
  }
};

}  // namespace

// The threads of a block run in ascending order if the seed is 0, else in an order shuffled by the seed.
extern "C" void set_order_on_host(uint64_t seed) { cuda_stand_in::order_seed = seed; }

// `sizes`, `in_strides` and `out_strides` are those of all dimensions except the pruned one, sorted and not merged.
// `per_factor`: the dimension has its own factors.
extern "C" int prune_on_host(const void* in, void* in_memory, int64_t in_bytes, void* out, int64_t out_bytes, int dtype,
                             int method, int scale, int n, int m, int64_t seed, int64_t size, int64_t in_stride,
                             int64_t out_stride, int dim_per_factor, int ndim, const int64_t* sizes,
                             const int64_t* in_strides, const int64_t* out_strides, const int64_t* row_steps,
                             const int64_t* per_factor) {
  PruneArgs args{};
  Copy input(in_memory, in_bytes), output(out, out_bytes);
  args.in = input.at(in);
  args.out = output.at(out);
  args.dtype = static_cast<DType>(dtype);
  args.pruning = {.method = static_cast<Method>(method), .n = n, .m = m, .seed = 0, .scale = scale != 0};
  args.size = size;
  args.in_stride = in_stride;
  args.out_stride = out_stride;
  args.dim_per_factor = dim_per_factor != 0;
  args.ndim = ndim;
  for (int d = 0; d < ndim; ++d) {
    args.dims[d] = {sizes[d], in_strides[d], out_strides[d], row_steps[d], per_factor[d] != 0};
  }
  if (traits(args.pruning.method).by_group) {
    launch_prune_nm(args, &seed, nullptr, nullptr);
  } else {
    const RescaleBytes bytes = rescale_bytes(args);
    const Room factors(bytes.factors), partial(bytes.partial);
    launch_rescale_factors(args, partial.data, factors.data, nullptr);
    launch_prune_nm(args, &seed, factors.data, nullptr);
  }
  output.copy_back();
  const PrunePlan plan = plan_prune(args);
  return static_cast<int>(plan.share) * 4 + plan.params.vector_in * 2 +
         plan.params.vector_out;  // the paths that were taken
}

extern "C" void pack_on_host(const void* in, void* in_memory, int64_t in_bytes, int64_t in_rows, int64_t in_cols,
                             int64_t row_stride, int64_t col_stride, int dtype, int method, int n, int m, int64_t seed,
                             int layout, int64_t rows, int64_t cols, void* packed, int64_t packed_bytes) {
  Copy input(in_memory, in_bytes), output(packed, packed_bytes);
  const PackArgs args{.in = input.at(in),
                      .in_rows = in_rows,
                      .in_cols = in_cols,
                      .row_stride = row_stride,
                      .col_stride = col_stride,
                      .dtype = static_cast<DType>(dtype),
                      .pruning = {.method = static_cast<Method>(method), .n = n, .m = m, .seed = 0, .scale = false},
                      .seed = &seed,
                      .layout = static_cast<Layout24>(layout),
                      .rows = rows,
                      .cols = cols,
                      .packed = output.at(packed)};
  launch_pack_24(args, nullptr);
  output.copy_back();
}

extern "C" int driver_version_on_host() { return driver_version(); }

}  // namespace sdgp::cuda
