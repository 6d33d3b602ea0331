"""Qwen3 decode: contract, reference and PyPTO kernels."""
