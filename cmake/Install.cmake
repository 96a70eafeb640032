# cmake --install: the single header, the compiled library, a CMake package and a pkg-config file, and the program
# (cli/CMakeLists.txt).  The prefix may be moved afterwards.

include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/qwen3next)

install(FILES ${QWEN3NEXT_SINGLE_HEADER} DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES ${PROJECT_SOURCE_DIR}/LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

install(TARGETS qwen3next qwen3next_headers EXPORT qwen3nextTargets
  ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT qwen3nextTargets NAMESPACE qwen3next:: DESTINATION ${package_dir})
if(QWEN3NEXT_USES_CUDA)
  # In a folder of its own: nobody else's -lcudart_static finds it.
  set(QWEN3NEXT_CUDART_DIR ${CMAKE_INSTALL_LIBDIR}/qwen3next)
  install(FILES ${QWEN3NEXT_CUDART} DESTINATION ${QWEN3NEXT_CUDART_DIR})
  set(QWEN3NEXT_PC_LIBS " -L\${libdir}/qwen3next -lcudart_static -ldl -lrt")
endif()
configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/qwen3nextConfig.cmake.in
  ${PROJECT_BINARY_DIR}/package/qwen3nextConfig.cmake INSTALL_DESTINATION ${package_dir}
  NO_SET_AND_CHECK_MACRO NO_CHECK_REQUIRED_COMPONENTS_MACRO)
write_basic_package_version_file(${PROJECT_BINARY_DIR}/package/qwen3nextConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${PROJECT_BINARY_DIR}/package/qwen3nextConfig.cmake
  ${PROJECT_BINARY_DIR}/package/qwen3nextConfigVersion.cmake
  ${CMAKE_CURRENT_LIST_DIR}/RuntimeDependencies.cmake
  DESTINATION ${package_dir})

file(RELATIVE_PATH QWEN3NEXT_PREFIX_FROM_PC
  ${CMAKE_INSTALL_PREFIX}/${CMAKE_INSTALL_LIBDIR}/pkgconfig ${CMAKE_INSTALL_PREFIX})
if(QWEN3NEXT_USES_IO_URING)
  set(QWEN3NEXT_PC_REQUIRES " liburing")
  set(QWEN3NEXT_PC_CFLAGS " -DQWEN3NEXT_IO_URING")
endif()
configure_file(${CMAKE_CURRENT_LIST_DIR}/qwen3next.pc.in ${PROJECT_BINARY_DIR}/package/qwen3next.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/package/qwen3next.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
