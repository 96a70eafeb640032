#pragma once
// Heavy definitions live in headers, too.  Header only, everybody sees them and they are inline.  With
// QWEN3NEXT_COMPILED they are compiled once, where QWEN3NEXT_LIBRARY is defined as well (generate/library.cpp, or one
// file of the user's), and nobody else parses them.

#if !defined(QWEN3NEXT_COMPILED)
#define QWEN3NEXT_DEFINITIONS 1
#define QWEN3NEXT_INLINE inline
#elif defined(QWEN3NEXT_LIBRARY)
#define QWEN3NEXT_DEFINITIONS 1
#define QWEN3NEXT_INLINE
#else
#define QWEN3NEXT_DEFINITIONS 0
#endif
