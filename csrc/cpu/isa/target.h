// What stands between SK_TARGET_BEGIN("features") and SK_TARGET_END is compiled for a processor
// that has them, whatever the rest of the program is compiled for.
#pragma once

#define SK_PRAGMA(words) _Pragma(#words)
#if defined(__clang__)
#define SK_TARGET_BEGIN(features) \
  SK_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define SK_TARGET_END SK_PRAGMA(clang attribute pop)
#define SK_WIDEST_VECTORS
#else
#define SK_TARGET_BEGIN(features) SK_PRAGMA(GCC push_options) SK_PRAGMA(GCC target(features))
#define SK_TARGET_END SK_PRAGMA(GCC pop_options)
#define SK_WIDEST_VECTORS , "prefer-vector-width=512"
#endif
