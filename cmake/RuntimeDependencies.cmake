# What a program with the library in it needs, for the build here and for whoever finds the installed package: sets
# QWEN3NEXT_RUNTIME_LIBRARIES to targets, and QWEN3NEXT_MISSING to what is not there, by its Debian package.
#
# QWEN3NEXT_USES_IO_URING: whether liburing is one of them.  The installed package says; the build takes it if it is there.
# QWEN3NEXT_USES_CUDA: whether the compiled library, not the header, needs the target qwen3next::cudart, CUDA's static
# runtime: QWEN3NEXT_CUDART, which is installed beside the library.

set(QWEN3NEXT_MISSING)

find_package(Threads QUIET)
if(NOT Threads_FOUND)
  list(APPEND QWEN3NEXT_MISSING "threads (apt-get install libc6-dev)")
endif()

# By its header: Debian's xsimd package names xtl in its CMake target but does not need it.
find_path(XSIMD_INCLUDE_DIR xsimd/xsimd.hpp)
if(NOT XSIMD_INCLUDE_DIR)
  list(APPEND QWEN3NEXT_MISSING "xsimd, vector kernels (apt-get install libxsimd-dev)")
elseif(NOT TARGET qwen3next::xsimd)
  add_library(qwen3next::xsimd INTERFACE IMPORTED GLOBAL)
  target_include_directories(qwen3next::xsimd INTERFACE ${XSIMD_INCLUDE_DIR})
endif()

find_package(nlohmann_json QUIET)
if(NOT nlohmann_json_FOUND)
  list(APPEND QWEN3NEXT_MISSING "nlohmann-json, JSON files (apt-get install nlohmann-json3-dev)")
endif()

find_path(UTF8PROC_INCLUDE_DIR utf8proc.h)
find_library(UTF8PROC_LIBRARY utf8proc)
if(NOT UTF8PROC_INCLUDE_DIR OR NOT UTF8PROC_LIBRARY)
  list(APPEND QWEN3NEXT_MISSING "utf8proc, Unicode (apt-get install libutf8proc-dev)")
elseif(NOT TARGET qwen3next::utf8proc)
  add_library(qwen3next::utf8proc INTERFACE IMPORTED GLOBAL)
  target_include_directories(qwen3next::utf8proc INTERFACE ${UTF8PROC_INCLUDE_DIR})
  target_link_libraries(qwen3next::utf8proc INTERFACE ${UTF8PROC_LIBRARY})
  if(WIN32 AND UTF8PROC_LIBRARY MATCHES "libutf8proc\\.a$")
    target_compile_definitions(qwen3next::utf8proc INTERFACE UTF8PROC_STATIC)  # or its header asks for a DLL
  endif()
endif()

set(QWEN3NEXT_RUNTIME_LIBRARIES qwen3next::xsimd nlohmann_json::nlohmann_json qwen3next::utf8proc Threads::Threads)

if(NOT DEFINED QWEN3NEXT_USES_IO_URING OR QWEN3NEXT_USES_IO_URING)
  find_path(URING_INCLUDE_DIR liburing.h)
  find_library(URING_LIBRARY uring)
  if(URING_INCLUDE_DIR AND URING_LIBRARY)
    set(QWEN3NEXT_USES_IO_URING ON)
    list(APPEND QWEN3NEXT_RUNTIME_LIBRARIES qwen3next::uring)
    if(NOT TARGET qwen3next::uring)
      add_library(qwen3next::uring INTERFACE IMPORTED GLOBAL)
      target_include_directories(qwen3next::uring INTERFACE ${URING_INCLUDE_DIR})
      target_link_libraries(qwen3next::uring INTERFACE ${URING_LIBRARY})
      target_compile_definitions(qwen3next::uring INTERFACE QWEN3NEXT_IO_URING)
    endif()
  elseif(DEFINED QWEN3NEXT_USES_IO_URING)
    list(APPEND QWEN3NEXT_MISSING "liburing, reading files by io_uring (apt-get install liburing-dev)")
  else()
    set(QWEN3NEXT_USES_IO_URING OFF)
  endif()
endif()

if(QWEN3NEXT_USES_CUDA AND NOT TARGET qwen3next::cudart)
  add_library(qwen3next::cudart INTERFACE IMPORTED GLOBAL)
  target_link_libraries(qwen3next::cudart INTERFACE ${QWEN3NEXT_CUDART} Threads::Threads ${CMAKE_DL_LIBS} rt)
endif()

string(REPLACE ";" "\n  " QWEN3NEXT_MISSING "${QWEN3NEXT_MISSING}")
