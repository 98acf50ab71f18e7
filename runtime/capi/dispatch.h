/* Compiler differences, in one place: one source, several instruction sets, chosen when the library is loaded.
 *
 * GCC on x86-64 Linux builds a function marked TUE_CLONES three times (baseline, AVX2, AVX-512) and picks by CPUID.
 * Elsewhere the mark is empty and the baseline is vectorised (NEON is part of the ARM64 baseline). The bytes do not
 * depend on the choice. Measured, 1920x1080 RGB to 224x224, one thread: see BUILD.md.
 */
#ifndef TUE_DISPATCH_H
#define TUE_DISPATCH_H

#include <string.h> /* brings __GLIBC__: the choice needs its ifunc relocations */

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12 /* older ones do not know the levels */
#define TUE_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#endif
#endif
#ifndef TUE_CLONES
#define TUE_CLONES
#endif

#if defined(__GNUC__)
#define TUE_INLINE static inline __attribute__((always_inline))
#define TUE_APART static __attribute__((noinline)) /* registers of its own */
#elif defined(_MSC_VER)
#define TUE_INLINE static __forceinline
#define TUE_APART static
#else
#define TUE_INLINE static inline
#define TUE_APART static
#endif

#endif
