// Rows times a panel: chooses the kernel for the format.
#include "gemm.h"

#include <algorithm>

#include "gemm_dense.h"
#include "gemm_grouped.h"
#include "gemm_tiles.h"

#if defined(__AMX_TILE__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace hr {
namespace {

// True if AMX did it. Whole numbers come out alike either way, so I8 takes the faster for the number of rows; bfloat16
// does not, and always takes the tiles, or a row would depend on its batch.
bool by_tiles(const Matrix& w, int panel, const Activations& x, int m0, int m1, float* out, int64_t ldc) {
#if defined(HR_TILES)
  constexpr int kFew = 4;  // rows for which both wait for memory
  if (w.format == Format::BF16) {
    gemm_tiles<Format::BF16>(w, panel, x, m0, m1, out, ldc);
    return true;
  }
  if (w.format == Format::I8 && m1 - m0 > kFew) {
    gemm_tiles<Format::I8>(w, panel, x, m0, m1, out, ldc);
    return true;
  }
#else
  (void)w, (void)panel, (void)x, (void)m0, (void)m1, (void)out, (void)ldc;
#endif
  return false;
}

}  // namespace

void gemm_panel(const Matrix& w, int panel, const Activations& x, int m0, int m1, float* out, int64_t ldc,
                bool use_tiles) {
  for (int row = m0; row < m1; row += kTileRows) {
    const int end = std::min(m1, row + kTileRows);
    float* to = out + static_cast<int64_t>(row - m0) * ldc;
    if (use_tiles && by_tiles(w, panel, x, row, end, to, ldc)) continue;
    switch (w.format) {
      case Format::F32: gemm_dense<Format::F32>(w, panel, x, row, end, to, ldc); break;
      case Format::BF16: gemm_dense<Format::BF16>(w, panel, x, row, end, to, ldc); break;
      case Format::I8: gemm_dense<Format::I8>(w, panel, x, row, end, to, ldc); break;
      case Format::Q8: gemm_grouped<Format::Q8>(w, panel, x, row, end, to, ldc); break;
      case Format::Q4: gemm_grouped<Format::Q4>(w, panel, x, row, end, to, ldc); break;
    }
  }
}

}  // namespace hr

extern "C" {

// The whole product, for tests and benchmarks: out[(i - m0) * ldc + j] for i in [m0, m1), j in [0, n_pad).
void hr_gemm(const hr::Matrix* w, const hr::Activations* x, int m0, int m1, float* out, int64_t ldc, int use_tiles) {
  for (int panel = 0; panel < w->n_pad / hr::kPanel; ++panel) {
    for (int row = m0; row < m1; row += hr::kTileRows) {
      hr::gemm_panel(*w, panel, *x, row, std::min(m1, row + hr::kTileRows),
                     out + (row - m0) * ldc + panel * hr::kPanel, ldc, use_tiles != 0);
    }
  }
}

// Asks the kernel for the tile registers, once for the process. 1: tiles may be used.
int hr_amx_enable() {
#if defined(HEADRACE_SOFT_TILES)
  return 1;
#elif defined(__AMX_TILE__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return 0;
#endif
}

}  // extern "C"
