// SPDX-License-Identifier: BSD-3-Clause
//
// The pruning settings of a call as one value. A schema lists them one by one: `n, m, dim, method, seed`. A host
// function takes a Settings, or a SettingsAlong<dim> if the schema has no `dim`. SDGP_BOX registers the function.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>

namespace sdgp {

// validate_prune checks these settings.
struct Settings {
  int64_t n;
  int64_t m;
  int64_t dim;
  std::string_view method;
  const std::optional<torch::stable::Tensor>& seed;
};

template <int kDim>
struct SettingsAlong : Settings {};

namespace boxing {

template <class... T>
struct Types {
  static constexpr size_t kCount = sizeof...(T);
};
template <class... A, class... B>
Types<A..., B...> operator+(Types<A...>, Types<B...>);

// Tells which schema arguments a parameter of a host function stands for, and makes the parameter from them.
template <class Parameter>
struct Argument {
  using InSchema = Types<Parameter>;
  static Parameter make(Parameter x) { return x; }
};
template <>
struct Argument<const Settings&> {
  using Seed = const std::optional<torch::stable::Tensor>&;
  using InSchema = Types<int64_t, int64_t, int64_t, std::string_view, Seed>;
  static Settings make(int64_t n, int64_t m, int64_t dim, std::string_view method, Seed seed) {
    return {n, m, dim, method, seed};
  }
};
template <int kDim>
struct Argument<const SettingsAlong<kDim>&> {
  using Seed = const std::optional<torch::stable::Tensor>&;
  using InSchema = Types<int64_t, int64_t, std::string_view, Seed>;
  static SettingsAlong<kDim> make(int64_t n, int64_t m, std::string_view method, Seed seed) {
    return {{n, m, kDim, method, seed}};
  }
};

template <auto kFunction, class Signature, class InSchema>
struct Unroll;
template <auto kFunction, class R, class... Parameters, class... Arguments>
struct Unroll<kFunction, R (*)(Parameters...), Types<Arguments...>> {
  // The index of each parameter's first argument.
  static constexpr auto kBegin = [] {
    std::array<size_t, sizeof...(Parameters)> begin{};
    size_t parameter = 0, next = 0;
    ((begin[parameter++] = next, next += Argument<Parameters>::InSchema::kCount), ...);
    return begin;
  }();

  template <class Parameter, size_t kAt, size_t... kI>
  static decltype(auto) make(const std::tuple<Arguments...>& all, std::index_sequence<kI...>) {
    return Argument<Parameter>::make(std::get<kAt + kI>(all)...);
  }

  static R call(Arguments... arguments) {
    const std::tuple<Arguments...> all(arguments...);
    return [&]<size_t... kP>(std::index_sequence<kP...>) {
      return kFunction(
          make<Parameters, kBegin[kP]>(all, std::make_index_sequence<Argument<Parameters>::InSchema::kCount>{})...);
    }(std::index_sequence_for<Parameters...>{});
  }
};

template <class R, class... Parameters>
auto in_schema(R (*)(Parameters...)) -> decltype((Types<>{} + ... + typename Argument<Parameters>::InSchema{}));

template <auto kFunction>
using Unrolled = Unroll<kFunction, decltype(kFunction), decltype(in_schema(kFunction))>;

}  // namespace boxing
}  // namespace sdgp

#define SDGP_BOX(function) TORCH_BOX((&sdgp::boxing::Unrolled<function>::call))
