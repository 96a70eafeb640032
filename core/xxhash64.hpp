#pragma once
// XXH64: a fast checksum against damage, not against malice (Yann Collet's xxHash, the specification's algorithm).

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

namespace qwen3next {

namespace detail {

inline constexpr std::uint64_t xxh_primes[] = {0x9E3779B185EBCA87u, 0xC2B2AE3D27D4EB4Fu, 0x165667B19E3779F9u,
                                               0x85EBCA77C2B2AE63u, 0x27D4EB2F165667C5u};

template <class T>
T load_little_endian(const std::byte* p) noexcept {
  static_assert(std::endian::native == std::endian::little);
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

constexpr std::uint64_t xxh_round(std::uint64_t sum, std::uint64_t lane) noexcept {
  return std::rotl(sum + lane * xxh_primes[1], 31) * xxh_primes[0];
}

}  // namespace detail

inline std::uint64_t xxhash64(std::span<const std::byte> bytes, std::uint64_t seed = 0) noexcept {
  using detail::load_little_endian, detail::xxh_round;
  constexpr const std::uint64_t(&P)[5] = detail::xxh_primes;
  const std::byte *p = bytes.data(), *const end = p + bytes.size();
  std::uint64_t hash = seed + P[4];
  if (bytes.size() >= 32) {  // four lanes of 8 bytes
    std::uint64_t lanes[] = {seed + P[0] + P[1], seed + P[1], seed, seed - P[0]};
    for (; end - p >= 32; p += 32) {
      for (int i = 0; i < 4; ++i) lanes[i] = xxh_round(lanes[i], load_little_endian<std::uint64_t>(p + 8 * i));
    }
    hash = std::rotl(lanes[0], 1) + std::rotl(lanes[1], 7) + std::rotl(lanes[2], 12) + std::rotl(lanes[3], 18);
    for (const std::uint64_t lane : lanes) hash = (hash ^ xxh_round(0, lane)) * P[0] + P[3];
  }
  hash += bytes.size();
  for (; end - p >= 8; p += 8) {
    hash = std::rotl(hash ^ xxh_round(0, load_little_endian<std::uint64_t>(p)), 27) * P[0] + P[3];
  }
  if (end - p >= 4) {
    hash = std::rotl(hash ^ load_little_endian<std::uint32_t>(p) * P[0], 23) * P[1] + P[2];
    p += 4;
  }
  for (; p < end; ++p) hash = std::rotl(hash ^ static_cast<std::uint64_t>(*p) * P[4], 11) * P[0];
  hash = (hash ^ hash >> 33) * P[1];
  hash = (hash ^ hash >> 29) * P[2];
  return hash ^ hash >> 32;
}

// Of several things, one after the other: what is added depends on all that was added before.
class HashChain {
 public:
  HashChain& add(std::span<const std::byte> bytes) noexcept {
    hash_ = xxhash64(bytes, hash_);
    return *this;
  }
  template <class T>
  requires std::is_arithmetic_v<T> || std::is_enum_v<T> HashChain& add(T value) noexcept {
    return add(std::as_bytes(std::span(&value, 1)));
  }
  std::uint64_t value() const noexcept { return hash_; }

 private:
  std::uint64_t hash_ = 0;
};

}  // namespace qwen3next
