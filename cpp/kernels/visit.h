// SPDX-License-Identifier: BSD-3-Clause
//
// Turns a run-time value into a compile-time one: a list of constants, and a visitor that is called with the constant
// that equals the value. Host code of every device. Each list is next to the type that it lists.
//
//   visit(DTypes{}, args.dtype, [&]<DType kDType>(Constant<kDType>) { run<kDType>(args); });
#pragma once

#include <type_traits>
#include <utility>

namespace sdgp {

template <auto kValue>
struct Constant {};

template <auto... kValues>
struct Values {};

// Calls `call` with the constant that equals `value`. The list must contain it.
template <auto kFirst, auto... kRest, class T, class Call>
decltype(auto) visit(Values<kFirst, kRest...>, T value, const Call& call) {
  if constexpr (sizeof...(kRest) > 0) {
    if (value != kFirst) return visit(Values<kRest...>{}, value, call);
  }
  return call(Constant<kFirst>{});
}

// Does the same with the first constant that is not less than `value`. The list must be ascending.
template <auto kFirst, auto... kRest, class T, class Call>
decltype(auto) visit_at_least(Values<kFirst, kRest...>, T value, const Call& call) {
  if constexpr (sizeof...(kRest) > 0) {
    if (value > kFirst) return visit_at_least(Values<kRest...>{}, value, call);
  }
  return call(Constant<kFirst>{});
}

template <auto... kValues, class T>
constexpr bool contains(Values<kValues...>, T value) {
  return ((value == kValues) || ...);
}

// Lists that follow from a table: the values of an enum, counted from 0, and the values that satisfy a predicate.
template <class Enum, int... kI>
Values<static_cast<Enum>(kI)...> enum_values(std::integer_sequence<int, kI...>);
template <class Enum, int kCount>
using EnumValues = decltype(enum_values<Enum>(std::make_integer_sequence<int, kCount>{}));

template <auto... kA, auto... kB>
constexpr Values<kA..., kB...> operator+(Values<kA...>, Values<kB...>) {
  return {};
}
template <auto kKeep, auto... kValues>
constexpr auto filter(Values<kValues...>) {
  return (Values<>{} + ... + std::conditional_t<kKeep(kValues), Values<kValues>, Values<>>{});
}
template <class List, auto kKeep>
using Filtered = decltype(filter<kKeep>(List{}));

}  // namespace sdgp
