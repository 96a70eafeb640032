# The CPU kernels, once for every instruction set of the target architecture: backends/cpu/kernels_isa.cpp compiled with
# -DQWEN3NEXT_ISA=<name> and that ISA's flags into an object library each.
#
#   qwen3next_add_cpu_kernels(TARGET)   adds the objects to TARGET, which must define QWEN3NEXT_MULTI_ISA
#
# QWEN3NEXT_CPU_KERNEL_OBJECTS lists the objects, for tests/ops/check_exported_symbols.sh.

function(qwen3next_add_cpu_kernel target isa)
  set(library qwen3next_kernels_${isa})
  add_library(${library} OBJECT ${PROJECT_SOURCE_DIR}/backends/cpu/kernels_isa.cpp)
  target_compile_features(${library} PRIVATE cxx_std_20)
  target_include_directories(${library} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${library} PRIVATE qwen3next::xsimd)
  target_compile_definitions(${library} PRIVATE QWEN3NEXT_ISA=${isa})
  # Optimised in every configuration: what is not inlined could leave the object (and would be slow).  Less so under
  # sanitizers, where GCC takes minutes for it.  No contraction: each ISA rounds as the source says.
  if(CMAKE_CXX_FLAGS MATCHES "fsanitize")
    set(optimise -O1)
  else()
    set(optimise -O3)
  endif()
  target_compile_options(${library} PRIVATE ${ARGN} ${optimise} -ffp-contract=off -fno-math-errno)
  if(WIN32 AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC aligns a stack to 16 bytes there, yet moves 32 and 64 as if they were aligned (GCC bug 54412).
    target_compile_options(${library} PRIVATE -Wa,-muse-unaligned-vector-move)
  endif()
  set_target_properties(${library} PROPERTIES POSITION_INDEPENDENT_CODE ON)
  if(TARGET qwen3next_warnings)
    target_link_libraries(${library} PRIVATE qwen3next_warnings)
  endif()
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:${library}>)
  set_property(GLOBAL APPEND PROPERTY QWEN3NEXT_CPU_KERNEL_OBJECTS $<TARGET_OBJECTS:${library}>)
endfunction()

# Names and flags; which of them a machine can run is backends/cpu/processor.hpp's to say.
function(qwen3next_add_cpu_kernels target)
  if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
    # GCC moves halves of vectors through MMX registers, which are the x87's: after that, Windows' exp gives NaN.
    set(sse2 -mno-mmx)
    set(sse4 ${sse2} -mssse3 -msse4.1 -msse4.2 -mpopcnt)
    set(avx2 ${sse4} -mavx2 -mfma -mf16c -mbmi2)
    set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni)
    qwen3next_add_cpu_kernel(${target} amx ${avx512} -mamx-tile -mamx-int8)
    qwen3next_add_cpu_kernel(${target} avx512 ${avx512})
    qwen3next_add_cpu_kernel(${target} avx2_vnni ${avx2} -mavxvnni)
    qwen3next_add_cpu_kernel(${target} avx2 ${avx2})
    qwen3next_add_cpu_kernel(${target} sse4 ${sse4})
    qwen3next_add_cpu_kernel(${target} baseline ${sse2})
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    qwen3next_add_cpu_kernel(${target} neon_i8mm -march=armv8.2-a+dotprod+i8mm)
    qwen3next_add_cpu_kernel(${target} neon_dotprod -march=armv8.2-a+dotprod)
    qwen3next_add_cpu_kernel(${target} neon)
  else()
    qwen3next_add_cpu_kernel(${target} baseline)
  endif()
endfunction()
