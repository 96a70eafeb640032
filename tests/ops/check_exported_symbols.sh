#!/bin/sh
# usage: check_exported_symbols.sh OBJECT...
#
# Kernel objects are compiled for newer CPUs than the rest of the program.  A function that leaves one could replace the
# copy of the same inline function that older CPUs run, so only kernels() may be visible.
status=0
for object in "$@"; do
  extra=$(nm --demangle --defined-only "$object" | grep -E ' [A-Zuvw] ' |
    grep -vE ' T qwen3next::cpu::[a-z0-9_]+::kernels\(\)$| V DW\.ref\.__gxx_personality_v0$')
  found=$(nm --demangle --defined-only "$object" | grep -cE ' T qwen3next::cpu::[a-z0-9_]+::kernels\(\)$')
  if [ -n "$extra" ] || [ "$found" != 1 ]; then
    echo "$object: exports more (or less) than kernels():" >&2
    echo "$extra" >&2
    status=1
  fi
done
exit $status
