// Numbers of 16 bits, one at a time.
#pragma once

#include <cstdint>
#include <cstring>

namespace onnx_tricks::cpu {
namespace {  // see vector.h

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

struct Half {
  std::uint16_t bits;
  Half() = default;
  explicit Half(float value) {
    const auto in = bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = in >> 16 & 0x8000, magnitude = in & 0x7fffffff;
    if (magnitude >= 0x47800000) {  // 2^16 and above, infinity, NaN
      bits = static_cast<std::uint16_t>(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
    } else if (magnitude < 0x38800000) {  // below the normal range: let an addition round
      const float shifted = bit_cast<float>(magnitude) + 0.5f;
      bits = static_cast<std::uint16_t>(sign | (bit_cast<std::uint32_t>(shifted) - 0x3f000000));
    } else {
      const std::uint32_t even = magnitude >> 13 & 1;
      bits = static_cast<std::uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + even) >> 13));
    }
  }
  explicit operator float() const {
    const std::uint32_t sign = std::uint32_t{bits} << 16 & 0x80000000;
    const std::uint32_t magnitude = std::uint32_t{bits} << 13 & 0x0fffe000;
    // 2^112 moves the exponent's bias; infinity and NaN have the largest exponent in both types.
    float value = bit_cast<float>(magnitude) * 0x1p112f;
    if (magnitude >= 0x0f800000) value = bit_cast<float>(magnitude | 0x7f800000);
    return bit_cast<float>(bit_cast<std::uint32_t>(value) | sign);
  }
};

struct Brief {
  std::uint16_t bits;
  Brief() = default;
  explicit Brief(float value) {
    const auto in = bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (in + 0x7fff + (in >> 16 & 1)) >> 16;
    bits = static_cast<std::uint16_t>(value != value ? in >> 16 | 0x40 : rounded);
  }
  explicit operator float() const { return bit_cast<float>(std::uint32_t{bits} << 16); }
};

}  // namespace
}  // namespace onnx_tricks::cpu
