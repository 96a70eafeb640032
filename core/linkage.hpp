#pragma once
// Heavy definitions live in headers, too.  Header only, everybody sees them and they are inline.  For those who link the
// library (QWEN3NEXT_COMPILED) they are compiled once, in generate/library.cpp, and nobody else parses them.

#if !defined(QWEN3NEXT_COMPILED)
#define QWEN3NEXT_DEFINITIONS 1
#define QWEN3NEXT_INLINE inline
#elif defined(QWEN3NEXT_LIBRARY)
#define QWEN3NEXT_DEFINITIONS 1
#define QWEN3NEXT_INLINE
#else
#define QWEN3NEXT_DEFINITIONS 0
#endif
