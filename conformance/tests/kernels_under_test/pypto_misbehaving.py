"""PyPTO kernels of ``rms_norm`` and ``o_proj``: a right one, and ones that fail in each way that a kernel can fail."""

import ctypes
import os
from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import kernel


def _normalised(pypto: Any, x: Any, weight: Any, dims: Dims) -> Any:
    """The right result, ``[B, H]`` bf16."""
    pypto.set_vec_tile_shapes(4, dims.H)
    wide = pypto.cast(x, pypto.DT_FP32)
    mean_square = pypto.sum(pypto.mul(pypto.mul(wide, wide), 1.0 / dims.H), -1, True)
    normalised = pypto.div(wide, pypto.sqrt(pypto.add(mean_square, dims.eps)))
    return pypto.cast(pypto.mul(normalised, weight), pypto.DT_BF16)


def _right(dims: Dims) -> Any:
    import pypto

    B, H = dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        out[:] = _normalised(pypto, x, weight, dims)

    return rms_norm


right = kernel("rms_norm", name="right", toolchain="pypto")(_right)


@kernel("rms_norm", toolchain="pypto")
def in_pieces(dims: Dims) -> Any:
    """Right; the two halves of its output are assembled by one call."""
    import pypto

    B, H = dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        result = _normalised(pypto, x, weight, dims)
        first = pypto.mul(pypto.view(result, [B, H // 2], [0, 0]), 1.0)
        second = pypto.mul(pypto.view(result, [B, H // 2], [0, H // 2]), 1.0)
        pypto.assemble([(first, [0, 0]), (second, [0, H // 2])], out, parallel=True)

    return rms_norm


@kernel("rms_norm", toolchain="pypto")
def half_written(dims: Dims) -> Any:
    """Writes the left half of its output only."""
    import pypto

    B, H = dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        pypto.set_vec_tile_shapes(4, H)
        left = pypto.view(pypto.cast(x, pypto.DT_FP32), [B, H // 2], [0, 0])
        pypto.assemble(pypto.cast(pypto.mul(left, 2.0), pypto.DT_BF16), [0, 0], out)

    return rms_norm


@kernel("rms_norm", toolchain="pypto")
def writes_its_input(dims: Dims) -> Any:
    """Doubles its weight in place besides writing its output."""
    import pypto

    B, H = dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        pypto.set_vec_tile_shapes(4, H)
        for _ in pypto.loop(1, name="USE", idx_name="use"):
            out[:] = pypto.cast(pypto.mul(pypto.cast(x, pypto.DT_FP32), weight), pypto.DT_BF16)
        for _ in pypto.loop(1, name="SPOIL", idx_name="spoil"):
            weight[:] = pypto.mul(pypto.cast(pypto.view(x, [1, H], [0, 0]), pypto.DT_FP32), 2.0)

    return rms_norm


@kernel("rms_norm", toolchain="pypto")
def segfaults(dims: Dims) -> Any:
    """Reads address 0."""
    return ctypes.string_at(0)


@kernel("rms_norm", toolchain="pypto")
def aborts(dims: Dims) -> Any:
    """Calls abort, as a failed assertion of a native library does."""
    print("an assertion failed", file=os.fdopen(2, "w", closefd=False), flush=True)
    os.abort()


@kernel("rms_norm", toolchain="pypto")
def exits(dims: Dims) -> Any:
    """Ends its process as if all were well."""
    os._exit(0)


@kernel("rms_norm", toolchain="pypto")
def never_ends(dims: Dims) -> Any:
    """Loops for ever."""
    while True:
        pass


@kernel("rms_norm", toolchain="pypto")
def builder_raises(dims: Dims) -> Any:
    """Raises before there is anything to compile."""
    raise KeyError("no such tile table")


@kernel("rms_norm", toolchain="pypto")
def body_raises(dims: Dims) -> Any:
    """Names something that does not exist, in the traced body."""
    import pypto

    B, H = dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        pypto.set_vec_tile_shapes(4, H)
        out[:] = pypto.cast(forgotten(x), pypto.DT_BF16)  # type: ignore[name-defined]  # noqa: F821  the fault

    return rms_norm


@kernel("rms_norm", toolchain="pypto")
def mixes_dtypes(dims: Dims) -> Any:
    """Adds bf16 to fp32: PyPTO's library refuses it while the body is traced."""
    import pypto

    B, H = dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        pypto.set_vec_tile_shapes(4, H)
        out[:] = pypto.cast(pypto.add(x, pypto.cast(x, pypto.DT_FP32)), pypto.DT_BF16)

    return rms_norm


@kernel("o_proj", toolchain="pypto")
def fails_in_a_pass(dims: Dims) -> Any:
    """Right where ``B`` is 2; otherwise its matrix tiles do not fit and a compiler pass gives up."""
    import pypto

    B, H, side = dims.B, dims.H, 64 if dims.B == 2 else 2048

    @pypto.frontend.jit()
    def o_proj(
        attn: pypto.Tensor([B, H], pypto.DT_BF16),
        wo: pypto.Tensor([H, H], pypto.DT_BF16),
        residual: pypto.Tensor([B, H], pypto.DT_BF16),
        out: pypto.Tensor([B, H], pypto.DT_FP32),
    ):
        pypto.set_vec_tile_shapes(4, H)
        pypto.set_cube_tile_shapes([16, 16], [side, side], [side, side])
        product = pypto.matmul(attn, wo, pypto.DT_FP32)
        out[:] = pypto.add(product, pypto.cast(residual, pypto.DT_FP32))

    return o_proj


@kernel("rms_norm", toolchain="pypto")
def hogs_memory(dims: Dims) -> Any:
    """Allocates until it is stopped."""
    held = []
    while True:
        held.append(bytearray(os.urandom(1) * (32 << 20)))


@kernel("rms_norm", toolchain="pypto")
def talks(dims: Dims) -> Any:
    """Right, and prints three megabytes to both streams each time it is built."""
    for stream in (1, 2):
        for _ in range(3):
            os.write(stream, b"noise\n" * 175_000)
    return _right(dims)


@kernel("rms_norm", toolchain="pypto")
def wrong_dtype(dims: Dims) -> Any:
    """Takes its weight as bf16."""
    import pypto

    B, H = dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_BF16),
        out: pypto.Tensor([B, H], pypto.DT_BF16),
    ):
        pypto.set_vec_tile_shapes(4, H)
        out[:] = pypto.mul(x, weight)

    return rms_norm


@kernel("rms_norm", toolchain="pypto")
def wrong_shape(dims: Dims) -> Any:
    """Takes 16 rows whatever the batch is."""
    import pypto

    H = dims.H

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([16, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([16, H], pypto.DT_BF16),
    ):
        pypto.set_vec_tile_shapes(4, H)
        out[:] = pypto.cast(pypto.cast(x, pypto.DT_FP32), pypto.DT_BF16)

    return rms_norm


@kernel("rms_norm", toolchain="pypto")
def wrong_order(dims: Dims) -> Any:
    """Takes its output first."""
    import pypto

    B, H = dims.B, dims.H

    @pypto.frontend.jit()
    def rms_norm(
        out: pypto.Tensor([B, H], pypto.DT_BF16),
        x: pypto.Tensor([B, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
    ):
        pypto.set_vec_tile_shapes(4, H)
        out[:] = pypto.mul(x, 2.0)

    return rms_norm


@kernel("rms_norm", toolchain="pypto")
def returns_a_function(dims: Dims) -> Any:
    """Forgets the decorator."""
    return lambda x, weight, out: None


@kernel("rms_norm", toolchain="pypto")
def dynamic_rows(dims: Dims) -> Any:
    """Right for any number of rows, which it learns from its arguments."""
    import pypto

    H, eps, TILE = dims.H, dims.eps, 4

    @pypto.frontend.jit()
    def rms_norm(
        x: pypto.Tensor([pypto.DYNAMIC, H], pypto.DT_BF16),
        weight: pypto.Tensor([1, H], pypto.DT_FP32),
        out: pypto.Tensor([pypto.DYNAMIC, H], pypto.DT_BF16),
    ):
        pypto.set_vec_tile_shapes(TILE, H)
        rows = x.shape[0]
        for block in pypto.loop((rows + TILE - 1) // TILE, name="BLOCK", idx_name="block"):
            valid = (rows - block * TILE).min(TILE)
            wide = pypto.cast(pypto.view(x, [TILE, H], [block * TILE, 0], valid_shape=[valid, H]), pypto.DT_FP32)
            mean_square = pypto.sum(pypto.mul(pypto.mul(wide, wide), 1.0 / H), -1, True)
            normalised = pypto.div(wide, pypto.sqrt(pypto.add(mean_square, eps)))
            pypto.assemble(pypto.cast(pypto.mul(normalised, weight), pypto.DT_BF16), [block * TILE, 0], out)

    return rms_norm


@kernel("rms_norm", toolchain="pypto")
def chosen_by_batch(dims: Dims) -> Any:
    """Another kernel for some batches, so that tests of several share a process; right for all others."""
    others = {2: dynamic_rows, 5: dynamic_rows, 9: half_written, 10: writes_its_input, 11: in_pieces}
    return others.get(dims.B, right).build(dims)
