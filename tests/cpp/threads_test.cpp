// SPDX-License-Identifier: BSD-3-Clause
//
// Runs eight threads at once, from the first call of kernels() on. Each thread prunes, packs and multiplies its own
// tensors, and all share the units of one call. ThreadSanitizer checks for races. Without it, the results must be those
// of one thread.
#include <atomic>
#include <latch>
#include <thread>

#include "harness.h"
#include "kernels/table.h"
#include "products.h"
#include "rows.h"
#include "weight_grad.h"

namespace {

using namespace sdgp::test;
using sdgp::Method;

constexpr int kThreads = 8;
using Floats = std::vector<float>;

struct Shared {
  Product product{"", 3, 1, 64, 20, {9, 9, 3, 1, 1, 1}, {9, 9, 3, 1, 1, 1}, Weight::kContiguous, true};
  Floats gradient = draw<Real<float>>(3 * 64 * 81);
  Floats weight = draw<Real<float>>(64 * 20 * 9);
  WeightProduct weight_product{
      "", 3, 1, 64, 20, {9, 9, 3, 1, 1, 1}, {9, 9, 3, 1, 1, 1}, Layout::kContiguous, Layout::kContiguous, false};
  Floats input = draw<Real<float>>(3 * 20 * 81);

  int64_t result_size() const { return 3 * 20 * 81; }
};

sdgp::PruneArgs rows_of(const Shared& shared, Method method) {
  const sdgp::Pruning pruning{.method = method, .n = 2, .m = 8, .seed = 7, .scale = false, .step = 2};
  sdgp::PruneArgs rows = describe_rows(shared.product, sdgp::DType::kFloat32, pruning, true);
  rows.in = shared.gradient.data();
  rows.dim_per_factor = true;
  return rows;
}

// Takes units from `next` until none is left, as the threads of a pool do.
template <class Run>
void share(std::atomic<int64_t>& next, int64_t units, Run run) {
  for (int64_t unit = next++; unit < units; unit = next++) run(unit, unit + 1);
}

// One call of each kernel. Several threads take the units. A latch between the calls keeps their order.
struct Calls {
  Calls(const Shared& shared, Method method)
      : pruned(shared.gradient.size()), out(static_cast<size_t>(shared.result_size())), rows(rows_of(shared, method)) {
    rows.out = pruned.data();
    spmm = describe(shared.product, sdgp::DType::kFloat32, rows.pruning);
    const sdgp::Kernels& table = sdgp::kernels();
    packed.resize(static_cast<size_t>(table.packed_bytes(spmm)) / sizeof(float) + 16);
    const auto address = reinterpret_cast<uintptr_t>(packed.data());
    spmm.packed = reinterpret_cast<void*>((address + 63) / 64 * 64);
    spmm.dense.data = shared.weight.data();
    spmm.out = out.data();
    spmm.threads = kThreads;
    gradient = describe_gradient(shared.product, rows);
    if (method == Method::kRescale) spmm.pruning.method = Method::kMagnitude;
    spmm.gradient = &gradient;
    weight_out.resize(static_cast<size_t>(shared.weight_product.result_size()));
    weight = describe(shared.weight_product, sdgp::DType::kFloat32, spmm.pruning);
    weight.gradient.data = shared.gradient.data();
    weight.input = shared.input.data();
    weight.out = weight_out.data();
    weight.threads = kThreads;
  }
  Calls(const Calls&) = delete;

  void prune_and_pack() {
    const sdgp::Kernels& table = sdgp::kernels();
    share(next_prune, table.prune_nm_units(rows),
          [&](int64_t begin, int64_t end) { table.prune_nm(rows, begin, end); });
    share(next_pack, table.pack_units(spmm), [&](int64_t begin, int64_t end) { table.pack(spmm, begin, end); });
  }

  void multiply() {
    const sdgp::Kernels& table = sdgp::kernels();
    share(next_multiply, table.spmm_nm_units(spmm), [&](int64_t begin, int64_t end) {
      if (!table.spmm_nm(spmm, begin, end)) valid = false;
    });
    share(next_weight, table.weight_grad_nm_units(weight),
          [&](int64_t begin, int64_t end) { table.weight_grad_nm(weight, begin, end); });
  }

  Floats pruned;
  Floats out;
  Floats packed;
  Floats weight_out;
  sdgp::PruneArgs rows;
  sdgp::SpmmArgs spmm;
  sdgp::WeightGradArgs weight;
  sdgp::Gradient gradient;
  std::atomic<int64_t> next_prune{0};
  std::atomic<int64_t> next_pack{0};
  std::atomic<int64_t> next_multiply{0};
  std::atomic<int64_t> next_weight{0};
  std::atomic<bool> valid{true};
};

bool same(const Calls& a, const Calls& b) {
  return a.valid && a.pruned == b.pruned && a.out == b.out && a.weight_out == b.weight_out;
}

template <class Work>
void in_threads(Work work) {
  std::latch ready(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&] {
      ready.arrive_and_wait();
      work();
    });
  }
  for (std::thread& thread : threads) thread.join();
}

void test_all() {
  const Shared shared;
  for (const Method method :
       {Method::kMagnitude, Method::kRandom, Method::kRescale, Method::kMvue, Method::kUnstructured}) {
    Calls alone(shared, method);
    alone.prune_and_pack();
    alone.multiply();
    std::atomic<int> wrong{0};
    in_threads([&] {
      Calls own(shared, method);
      own.prune_and_pack();
      own.multiply();
      wrong += !same(own, alone);
    });
    expect(wrong == 0, "threads with calls of their own");
    Calls together(shared, method);
    std::latch packed(kThreads);
    in_threads([&] {
      together.prune_and_pack();
      packed.arrive_and_wait();
      together.multiply();
    });
    expect(same(together, alone), "threads that share the units of a call");
  }
}

// Run this first, because any of the threads may be the first to choose the table and to read the cache size.
void first_calls() {
  std::atomic<int> failed{0};
  in_threads([&] {
    try {
      sdgp::kernels();
    } catch (const std::runtime_error&) {
      ++failed;
    }
    sdgp::first_level_cache_bytes();
  });
  expect(failed == 0 || failed == kThreads, "kernels() of every thread");
}

}  // namespace

int main() {
  first_calls();
  return run(&test_all);
}
