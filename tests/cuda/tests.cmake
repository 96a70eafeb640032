# The CUDA backend's tests: cuda_host and cuda_no_gpu run anywhere, the others are skipped where there is no GPU.

qwen3next_test_folder(cuda)
file(GLOB api CONFIGURE_DEPENDS ${CMAKE_CURRENT_SOURCE_DIR}/api/test_*.cpp)
target_sources(test_cuda PRIVATE ${api})  # once more, on this backend
target_compile_definitions(test_cuda PRIVATE QWEN3NEXT_TEST_ON_CUDA)

# Also on a machine with a GPU, which is hidden.
add_test(NAME cuda_host COMMAND test_cuda --host)
if(QWEN3NEXT_CLI)
  add_test(NAME cuda_no_gpu COMMAND bash ${CMAKE_CURRENT_LIST_DIR}/test_no_gpu.sh $<TARGET_FILE:qwen3next_cli> ${PROJECT_SOURCE_DIR})
endif()

add_test(NAME cuda COMMAND test_cuda)
set(gpu_tests cuda)
find_program(COMPUTE_SANITIZER compute-sanitizer HINTS ${CMAKE_CUDA_COMPILER_TOOLKIT_ROOT}/bin)
if(COMPUTE_SANITIZER)
  # A hundred times as slow: the cases of one suite, all kernels on the smallest of models.
  foreach(tool memcheck racecheck)
    add_test(NAME cuda_${tool} COMMAND ${COMPUTE_SANITIZER} --tool ${tool} --error-exitcode 1
      $<TARGET_FILE:test_cuda> --test-suite=sanitizer)
    list(APPEND gpu_tests cuda_${tool})
  endforeach()
endif()
# One at a time: they measure free memory, and fill it.
set_tests_properties(${gpu_tests} PROPERTIES SKIP_RETURN_CODE 77 RUN_SERIAL ON)
