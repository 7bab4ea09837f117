// SPDX-License-Identifier: BSD-3-Clause
//
// From a run-time value to a compile-time one: a list of constants, and a visitor that is called with the one that a
// value names. Host code of every device; the lists stand beside what they are of.
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

// Calls `call` with the constant that `value` equals; it must be in the list.
template <auto kFirst, auto... kRest, class T, class Call>
decltype(auto) visit(Values<kFirst, kRest...>, T value, const Call& call) {
  if constexpr (sizeof...(kRest) > 0) {
    if (value != kFirst) return visit(Values<kRest...>{}, value, call);
  }
  return call(Constant<kFirst>{});
}

// The same with the first constant of an ascending list that is no less.
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

// Lists that follow from a table: an enum's values, counted from 0, and those of them that a predicate keeps.
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
