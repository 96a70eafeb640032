# Debian's cross compiler for Windows, and Wine to run what it makes; see scripts/test --windows.
#   packages: g++-mingw-w64-x86-64-posix wine64;  scripts/cross-sysroot x86_64-w64-mingw32  makes the sysroot

set(CMAKE_SYSTEM_NAME Windows)
set(CMAKE_SYSTEM_PROCESSOR x86_64)
set(CMAKE_CXX_COMPILER x86_64-w64-mingw32-g++-posix)
set(CMAKE_RC_COMPILER x86_64-w64-mingw32-windres)
set(CMAKE_CROSSCOMPILING_EMULATOR wine)
# GCC keeps the stack aligned to 16 bytes only and yet spills vectors of 32 and 64 with aligned moves (its bug 54412).
set(CMAKE_CXX_FLAGS_INIT "-Wa,-mbig-obj -Wa,-muse-unaligned-vector-move")
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)  # one file, without the compiler's DLLs beside it

set(CMAKE_FIND_ROOT_PATH ${CMAKE_CURRENT_LIST_DIR}/../../build/sysroot/x86_64-w64-mingw32)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_PACKAGE ONLY)
