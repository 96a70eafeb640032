// Which kernels run where: processors as CPUID describes them, names as users type them.

#include <doctest/doctest.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "backends/cpu/dispatch.hpp"

using namespace qwen3next;
using cpu::Level;
using cpu::X86;

namespace {

// Words with the named bits.
constexpr std::uint32_t bits(std::initializer_list<int> list) {
  std::uint32_t word = 0;
  for (int bit : list) word |= std::uint32_t{1} << bit;
  return word;
}
// Features as they came over the years.
constexpr std::uint32_t ssse3 = bits({9}), nehalem = ssse3 | bits({19, 20, 23}), avx_fma_f16c = bits({12, 28, 29});
constexpr std::uint32_t avx2_bmi2 = bits({5, 8}), avx512_skylake = bits({16, 17, 30, 31}), vnni = bits({11});
constexpr std::uint64_t xmm_ymm = 0x7, all_zmm = 0xe7, tiles = 0x60000;

std::string runs(const X86& x) {
  return std::string(x.sse4() ? "sse4 " : "") + (x.avx2() ? "avx2 " : "") + (x.avx2_vnni() ? "avx2_vnni " : "") +
         (x.avx512() ? "avx512 " : "") + (x.amx() ? "amx " : "");
}

// Tables with nothing but a name.
const cpu::Kernels& named(const char* name) noexcept {
  static cpu::Kernels table{};
  table.name = name;
  return table;
}
const cpu::Kernels& first() noexcept { return named("first"); }
const cpu::Kernels& second() noexcept { return named("second"); }
const cpu::Kernels& never() noexcept {
  FAIL_CHECK("asked for kernels that are not supported");
  return named("never");
}

}  // namespace

TEST_CASE("x86: processors of every age") {
  CHECK(runs({}) == "");
  CHECK(runs({.leaf1_ecx = ssse3}) == "");  // Core 2
  CHECK(runs({.leaf1_ecx = nehalem}) == "sse4 ");
  CHECK(runs({.leaf1_ecx = nehalem | avx_fma_f16c, .xcr0 = xmm_ymm}) == "sse4 ");  // Piledriver: FMA without AVX2
  const X86 haswell{.leaf1_ecx = nehalem | avx_fma_f16c, .leaf7_ebx = avx2_bmi2, .xcr0 = xmm_ymm};
  CHECK(runs(haswell) == "sse4 avx2 ");
  X86 alder_lake = haswell;
  alder_lake.leaf7_1_eax = bits({4});
  CHECK(runs(alder_lake) == "sse4 avx2 avx2_vnni ");
  X86 skylake_server = haswell;
  skylake_server.leaf7_ebx |= avx512_skylake;
  skylake_server.xcr0 = all_zmm;
  CHECK(runs(skylake_server) == "sse4 avx2 ");  // its AVX-512 has no VNNI
  X86 ice_lake = skylake_server;
  ice_lake.leaf7_ecx = vnni;
  CHECK(runs(ice_lake) == "sse4 avx2 avx512 ");
  X86 sapphire_rapids = ice_lake;
  sapphire_rapids.leaf7_1_eax = bits({4});
  CHECK(runs(sapphire_rapids) == "sse4 avx2 avx2_vnni avx512 ");  // a system that knows no tiles
  sapphire_rapids.leaf7_edx = bits({22, 24, 25});
  sapphire_rapids.xcr0 = all_zmm | tiles;
  CHECK(runs(sapphire_rapids) == "sse4 avx2 avx2_vnni avx512 ");  // and one that does not let this process have them
  sapphire_rapids.tiles_allowed = true;
  CHECK(runs(sapphire_rapids) == "sse4 avx2 avx2_vnni avx512 amx ");
  sapphire_rapids.leaf7_edx = bits({22, 24});  // without int8
  CHECK(runs(sapphire_rapids) == "sse4 avx2 avx2_vnni avx512 ");
}

TEST_CASE("x86: registers that the system does not save are not used") {
  X86 x{.leaf1_ecx = nehalem | avx_fma_f16c,
        .leaf7_ebx = avx2_bmi2 | avx512_skylake,
        .leaf7_ecx = vnni,
        .leaf7_edx = bits({24, 25}),
        .leaf7_1_eax = bits({4}),
        .xcr0 = all_zmm | tiles,
        .tiles_allowed = true};
  CHECK(runs(x) == "sse4 avx2 avx2_vnni avx512 amx ");
  for (std::uint64_t missing : {0x20000, 0x40000}) {  // tile configuration, tile data
    x.xcr0 = (all_zmm | tiles) & ~missing;
    CHECK(runs(x) == "sse4 avx2 avx2_vnni avx512 ");
  }
  for (std::uint64_t missing : {0x20, 0x40, 0x80}) {  // mask registers, upper halves, ZMM16 to 31
    x.xcr0 = all_zmm & ~missing;
    CHECK(runs(x) == "sse4 avx2 avx2_vnni ");
  }
  x.xcr0 = 0x3;
  CHECK(runs(x) == "sse4 ");
  x.xcr0 = 0;
  CHECK(runs(x) == "sse4 ");
}

TEST_CASE("kernels: best first, by name, and an error that lists them") {
  const std::vector<Level> levels{{"newest", false, never}, {"first", true, first}, {"second", true, second}};
  CHECK(cpu::choose_kernels("", levels).name == std::string("first"));
  CHECK(cpu::choose_kernels("second", levels).name == std::string("second"));
  CHECK_THROWS_WITH_AS(cpu::choose_kernels("newest", levels),
                       "this machine cannot run the CPU kernels 'newest'; choose from newest (not on this machine), "
                       "first, second",
                       Error);
  CHECK_THROWS_WITH_AS(cpu::choose_kernels("mmx", levels),
                       "there are no CPU kernels called 'mmx'; choose from newest (not on this machine), first, second",
                       Error);
}

TEST_CASE("kernels: this program's") {
  const std::vector<Level> levels = cpu::levels();
  CHECK(levels.back().supported);  // the plain one runs everywhere
  for (const Level& level : levels) {
    CAPTURE(level.name);
    if (level.supported) CHECK(cpu::choose_kernels(level.name).name == std::string(level.name));
  }
  CHECK(cpu::choose_kernels("").name == cpu::available_isas().front());
}
