/* The matrix products of MLX's CPU wheel, answered by OpenBLAS.
 *
 * MLX on Linux links a reference BLAS (2-4 GFLOP/s in float32). The PyPI wheel scipy-openblas32 carries OpenBLAS
 * with every symbol prefixed by `scipy_`. This library, preloaded, defines the three cblas routines that MLX imports
 * and hands them on; all others (LAPACK) stay where they were. MLX walks over batches itself, so there is no strided
 * or batched routine to answer. Integers are 32-bit in both. `make setup` compiles it; see the Makefile.
 *
 * SCALAR is what alpha and beta are: a value for real types, a pointer for complex ones.
 */
#define GEMM(NAME, SCALAR, ELEMENT)                                                                                \
  void scipy_cblas_##NAME(int order, int trans_a, int trans_b, int m, int n, int k, SCALAR alpha,                  \
                          const ELEMENT *a, int lda, const ELEMENT *b, int ldb, SCALAR beta, ELEMENT *c, int ldc); \
  void cblas_##NAME(int order, int trans_a, int trans_b, int m, int n, int k, SCALAR alpha,                        \
                    const ELEMENT *a, int lda, const ELEMENT *b, int ldb, SCALAR beta, ELEMENT *c, int ldc) {      \
    scipy_cblas_##NAME(order, trans_a, trans_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);                     \
  }

GEMM(sgemm, float, float)
GEMM(dgemm, double, double)
GEMM(cgemm, const void *, void)
