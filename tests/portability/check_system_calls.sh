#!/bin/sh
# usage: check_system_calls.sh SOURCE_DIR
#
# What differs between operating systems stays in a few files, each with a plain way for systems that it does not know.
# A new file on this list is a new place to port: rather extend one.
owners='
backends/aligned_bytes.hpp  large pages, locked pages
backends/cpu/processor.hpp  instruction sets
bench/bandwidth.hpp         size of the last cache
cli/interrupt.hpp           Ctrl-C
cli/line_input.hpp          libedit
cli/terminal.hpp            is it a terminal
cli/windows.hpp             UTF-8 and bytes
core/available_memory.hpp   free memory of Windows
core/available_processors.hpp  affinity
weights/atomic_file.hpp     exclusive creation, fsync
weights/direct_file.hpp     reads around the cache
weights/mapped_file.hpp     mappings
weights/read_queue_uring.hpp  io_uring
'
headers='unistd|fcntl|io|windows|winsock2?|shellapi|sched|pthread|termios|signal|poll|dlfcn|cpuid|spawn|dirent|pwd|glob|sys/[a-z]+|linux/[a-z_]+'
pattern="# *include *<($headers)\.h>|# *include *<(csignal|editline/.*)>|__linux__|__unix__|__APPLE__|_WIN32|\"/(proc|sys|dev|tmp)/"

cd "$1" || exit 1
status=0
found=$(find qwen3next.hpp core blocks backends model weights text generate cli bench examples \
  \( -name '*.hpp' -o -name '*.cpp' \) -exec grep -lE "$pattern" {} +)
for file in $found; do
  if ! echo "$owners" | grep -q "^$file "; then
    echo "$file: names an operating system or its headers; $0 lists the files that may:" >&2
    grep -nE "$pattern" "$file" >&2
    status=1
  fi
done
for file in $(echo "$owners" | awk '{print $1}'); do
  if ! echo "$found" | grep -qx "$file"; then
    echo "$file: no longer needs to be on the list in $0" >&2
    status=1
  fi
done
exit $status
