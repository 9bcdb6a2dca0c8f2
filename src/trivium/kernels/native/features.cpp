// Asks the CPU and its system which of the libraries beside this one may be loaded.
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

// What this CPU and its system offer: 1 AVX2 with FMA and F16C, 2 AVX-512 with VNNI, 4 AMX in int8 and bf16. Asks the
// system for the tiles' state where it must be asked.
extern "C" __attribute__((visibility("default"))) int trivium_features() {
  int found = 0;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1)) found |= 1;
  }
  if ((found & 1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    found |= 2;
#if defined(__linux__)
  unsigned a, b, c, d;
  if ((found & 2) && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1)) {
    const long request_permission = 0x1023, tile_data = 18;
    if (syscall(SYS_arch_prctl, request_permission, tile_data) == 0) found |= 4;
  }
#endif
#endif
  return found;
}
