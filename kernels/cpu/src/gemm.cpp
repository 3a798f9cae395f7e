// Rows times a panel: chooses the kernel for the format.
#include "gemm.h"

#include <algorithm>

#include "gemm_dense.h"
#include "gemm_grouped.h"

namespace hr {

void gemm_panel(const Matrix& w, int panel, const Activations& x, int m0, int m1, float* out, int64_t ldc,
                bool use_tiles) {
  (void)use_tiles;
  for (int row = m0; row < m1; row += kTileRows) {
    const int end = std::min(m1, row + kTileRows);
    float* to = out + static_cast<int64_t>(row - m0) * ldc;
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

// The whole product, for tests and benchmarks: out[(i - m0) * ldc + j] for i in [m0, m1), j in [0, n_pad).
extern "C" void hr_gemm(const hr::Matrix* w, const hr::Activations* x, int m0, int m1, float* out, int64_t ldc,
                        int use_tiles) {
  for (int panel = 0; panel < w->n_pad / hr::kPanel; ++panel) {
    for (int row = m0; row < m1; row += hr::kTileRows) {
      hr::gemm_panel(*w, panel, *x, row, std::min(m1, row + hr::kTileRows),
                     out + (row - m0) * ldc + panel * hr::kPanel, ldc, use_tiles != 0);
    }
  }
}
