#pragma once
// Heavy definitions live in headers, too.  Header only, they are inline; for those who link the library
// (QWEN3NEXT_COMPILED) they are compiled once, in generate/library.cpp, and their headers are not included.

#ifdef QWEN3NEXT_COMPILED
#define QWEN3NEXT_INLINE
#else
#define QWEN3NEXT_INLINE inline
#endif
