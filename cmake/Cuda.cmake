# The CUDA backend: backends/cuda/*.cu compiled into the library, if a toolkit is found.  Its headers are plain C++; no
# other folder sees one of CUDA's.
#
#   qwen3next_find_cuda()        sets QWEN3NEXT_USES_CUDA, by the option QWEN3NEXT_CUDA, and enables the language
#   qwen3next_add_cuda(TARGET)   adds the backend to TARGET and the definition QWEN3NEXT_CUDA to what is built with it
#
# The runtime is linked statically, so that the program also starts where there is neither GPU nor driver, and says so
# only when the backend is asked for.

set(QWEN3NEXT_CUDA_LEAST 12.8)  # knows compute capability 12.0

macro(qwen3next_find_cuda)
  set(QWEN3NEXT_USES_CUDA OFF)
  if(QWEN3NEXT_CUDA)
    _qwen3next_find_nvcc()
    if(qwen3next_cuda_problem AND NOT QWEN3NEXT_CUDA STREQUAL "AUTO")
      message(FATAL_ERROR "${qwen3next_cuda_problem}, and QWEN3NEXT_CUDA is ${QWEN3NEXT_CUDA}: run scripts/cuda-toolkit, "
        "which puts one into build/cuda-toolkit; or install NVIDIA's CUDA toolkit and put nvcc on the PATH (or into "
        "CUDACXX); or configure with -DQWEN3NEXT_CUDA=OFF")
    elseif(qwen3next_cuda_problem)
      message(STATUS "No CUDA backend: ${qwen3next_cuda_problem}")
    else()
      # Machine code for A100 and RTX 30, RTX 40, H100 and H200, RTX 50; of the last two what B200 and later ones translate.
      if(NOT CMAKE_CUDA_ARCHITECTURES)
        set(CMAKE_CUDA_ARCHITECTURES 80-real 89-real 90 120)
      endif()
      if(NOT CMAKE_CUDA_COMPILER)
        set(CMAKE_CUDA_COMPILER ${QWEN3NEXT_NVCC})
      endif()
      enable_language(CUDA)
      foreach(kind STANDARD EXTENSION)
        if(NOT CMAKE_CUDA20_${kind}_COMPILE_OPTION)
          set(CMAKE_CUDA20_${kind}_COMPILE_OPTION -std=c++20)  # CMake 3.25 does not know that nvcc can
        endif()
      endforeach()
      # That compiler's own: FindCUDAToolkit would take one of another version from /usr/local/lib.
      find_library(QWEN3NEXT_CUDART NAMES libcudart_static.a NO_DEFAULT_PATH
        PATHS ${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT} ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} PATH_SUFFIXES lib64 lib)
      if(NOT QWEN3NEXT_CUDART)
        message(FATAL_ERROR "${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT} has no lib64/libcudart_static.a, CUDA's static runtime: "
          "install the whole toolkit, or run scripts/cuda-toolkit --own")
      endif()
      set(QWEN3NEXT_USES_CUDA ON)
      message(STATUS "CUDA backend: ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}, for ${CMAKE_CUDA_ARCHITECTURES}")
    endif()
  endif()
endmacro()

# Sets qwen3next_cuda_problem to what is in the way, or QWEN3NEXT_NVCC.
macro(_qwen3next_find_nvcc)
  set(qwen3next_cuda_problem)
  find_program(QWEN3NEXT_NVCC NAMES ${CMAKE_CUDA_COMPILER} $ENV{CUDACXX} nvcc
    PATHS $ENV{CUDA_PATH}/bin /usr/local/cuda/bin ${PROJECT_SOURCE_DIR}/build/cuda-toolkit/bin NO_CMAKE_FIND_ROOT_PATH)
  if(CMAKE_CROSSCOMPILING)
    set(qwen3next_cuda_problem "it is not cross-compiled")
  elseif(NOT QWEN3NEXT_NVCC)
    set(qwen3next_cuda_problem "no CUDA toolkit (nvcc) found")
  else()
    execute_process(COMMAND ${QWEN3NEXT_NVCC} --version OUTPUT_VARIABLE qwen3next_nvcc ERROR_QUIET)
    string(REGEX MATCH "release ([0-9.]+)" qwen3next_nvcc "${qwen3next_nvcc}")
    if(NOT CMAKE_MATCH_1 VERSION_GREATER_EQUAL QWEN3NEXT_CUDA_LEAST)
      set(qwen3next_cuda_problem "${QWEN3NEXT_NVCC} is CUDA '${CMAKE_MATCH_1}', expected ${QWEN3NEXT_CUDA_LEAST} or later")
    endif()
  endif()
endmacro()

function(qwen3next_add_cuda target)
  file(GLOB sources CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/backends/cuda/*.cu)
  add_library(qwen3next_cuda OBJECT ${sources})
  target_include_directories(qwen3next_cuda PRIVATE ${PROJECT_SOURCE_DIR})
  # Optimised in every configuration, as the CPU's kernels are.  --threads: several architectures of a file at a time.
  target_compile_options(qwen3next_cuda PRIVATE -O3 --threads 2 --extended-lambda -Xcompiler=-Wall,-Wextra)
  set_target_properties(qwen3next_cuda PROPERTIES CUDA_STANDARD 20 CUDA_RUNTIME_LIBRARY Static POSITION_INDEPENDENT_CODE ON)
  target_sources(${target} PRIVATE $<TARGET_OBJECTS:qwen3next_cuda>)
  target_link_libraries(${target} PRIVATE qwen3next::cudart)
  target_compile_definitions(${target} PUBLIC $<BUILD_INTERFACE:QWEN3NEXT_CUDA>)
endfunction()
