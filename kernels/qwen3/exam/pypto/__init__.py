"""PyPTO kernels with a known fault, and legal ones that compute otherwise than the bundled kernels."""
