"""PyPTO kernels that assemble a buffer and read it: ``LEGAL`` ones, and ``FAULTS`` that read what nothing wrote.

They have the arguments of ``rms_norm`` and compute something else: only what the compiler makes of them is looked at.
"""

from collections.abc import Callable
from typing import Any

from conformance.contract.dims import Dims
from conformance.contract.kernel import Kernel, kernel

Body = Callable[[Any, Any, Any, Any, Dims], None]

LEGAL: dict[str, Kernel] = {}
FAULTS: dict[str, Kernel] = {}


def _declared(body: Body, kernels: dict[str, Kernel]) -> Kernel:
    def build(dims: Dims) -> Any:
        import pypto

        B, H = dims.B, dims.H

        @pypto.frontend.jit()
        def rms_norm(
            x: pypto.Tensor([B, H], pypto.DT_BF16),
            weight: pypto.Tensor([1, H], pypto.DT_FP32),
            out: pypto.Tensor([B, H], pypto.DT_BF16),
        ):
            pypto.set_vec_tile_shapes(4, H)
            pypto.set_cube_tile_shapes([16, 16], [64, 64], [64, 64])
            body(pypto, x, weight, out, dims)

        return rms_norm

    kernels[body.__name__] = kernel("rms_norm", name=body.__name__, toolchain="pypto")(build)
    return kernels[body.__name__]


def legal(body: Body) -> Kernel:
    """Declare a kernel that reads nothing but what it wrote, or drops the rest again."""
    return _declared(body, LEGAL)


def fault(body: Body) -> Kernel:
    """Declare a kernel whose output depends on memory that nothing wrote."""
    return _declared(body, FAULTS)


def _half(pypto: Any, x: Any, dims: Dims, start: int) -> Any:
    return pypto.cast(pypto.view(x, [dims.B, dims.H // 2], [0, start]), pypto.DT_FP32)


def _buffer(pypto: Any, rows: int, columns: int) -> Any:
    return pypto.tensor([rows, columns], pypto.DT_FP32, "buffer")


def _result(pypto: Any, value: Any) -> Any:
    return pypto.cast(pypto.mul(value, 2.0), pypto.DT_BF16)


@legal
def whole_in_pieces(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """Two halves."""
    buffer = _buffer(pypto, dims.B, dims.H)
    pypto.assemble(_half(pypto, x, dims, 0), [0, 0], buffer)
    pypto.assemble(_half(pypto, x, dims, dims.H // 2), [0, dims.H // 2], buffer)
    out[:] = _result(pypto, buffer)


@legal
def whole_by_a_list(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """Two halves in one call, one after the other."""
    buffer, half = _buffer(pypto, dims.B, dims.H), dims.H // 2
    pypto.assemble([(_half(pypto, x, dims, 0), [0, 0]), (_half(pypto, x, dims, half), [0, half])], buffer)
    out[:] = _result(pypto, buffer)


@legal
def whole_by_a_parallel_list(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """Two halves in one call, in any order."""
    buffer, half = _buffer(pypto, dims.B, dims.H), dims.H // 2
    pypto.assemble([(_half(pypto, x, dims, 0), [0, 0]), (_half(pypto, x, dims, half), [0, half])], buffer, parallel=True)
    out[:] = _result(pypto, buffer)


@legal
def covered_part_read(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """The buffer is wider than what is written, and only that is read, through a view of a view."""
    buffer = _buffer(pypto, dims.B, dims.H + 64)
    pypto.assemble(pypto.cast(x, pypto.DT_FP32), [0, 64], buffer)
    right = pypto.view(buffer, [dims.B, dims.H], [0, 64])
    out[:] = _result(pypto, pypto.view(right, [dims.B, dims.H], [0, 0]))


@legal
def padding_cleared(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """The whole buffer is zeros before the rows are written."""
    buffer = _buffer(pypto, dims.B, dims.H + 64)
    buffer[:] = pypto.full([dims.B, dims.H + 64], 0.0, pypto.DT_FP32)
    pypto.assemble(pypto.cast(x, pypto.DT_FP32), [0, 0], buffer)
    out[:] = _result(pypto, pypto.sub(pypto.cast(x, pypto.DT_FP32), pypto.sum(buffer, -1, True)))


@legal
def padding_rows_dropped(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """Rows that fill a tile go through a product and a row sum, and none of their results is used."""
    padded = pypto.tensor([16, dims.H], pypto.DT_BF16, "padded")
    pypto.assemble(pypto.mul(x, 1.0), [0, 0], padded)
    square = pypto.matmul(x, x, pypto.DT_BF16, a_trans=True)
    product = pypto.matmul(padded, square, pypto.DT_FP32)
    scaled = pypto.div(product, pypto.sum(product, -1, True))
    out[:] = _result(pypto, pypto.view(scaled, [dims.B, dims.H], [0, 0]))


@legal
def padding_not_valid(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A column sum over a tile of which only some rows are valid."""
    buffer = _buffer(pypto, 16, dims.H)
    pypto.assemble(pypto.cast(x, pypto.DT_FP32), [0, 0], buffer)
    rows = pypto.view(buffer, [16, dims.H], [0, 0], valid_shape=[dims.B, dims.H])
    out[:] = _result(pypto, pypto.sub(pypto.cast(x, pypto.DT_FP32), pypto.sum(rows, 0, True)))


@legal
def padding_not_valid_in_a_loop(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A column sum over a tile of which only the loop knows how many rows are valid."""
    for b in pypto.loop(dims.B, name="ROW", idx_name="b"):
        buffer = _buffer(pypto, 2, dims.H)
        row = pypto.cast(pypto.view(x, [1, dims.H], [b, 0]), pypto.DT_FP32)
        pypto.assemble(row, [0, 0], buffer)
        rows = pypto.view(buffer, [2, dims.H], [0, 0], valid_shape=[(dims.B - b).min(1), dims.H])
        pypto.assemble(_result(pypto, pypto.sub(row, pypto.sum(rows, 0, True))), [b, 0], out)


@legal
def spoiled_part_covered(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A half that was computed from garbage is written over before it is read."""
    buffer, half = _buffer(pypto, dims.B, dims.H), dims.H // 2
    pypto.assemble(_half(pypto, x, dims, 0), [0, 0], buffer)
    joined = pypto.tensor([dims.B, dims.H], pypto.DT_FP32, "joined")
    pypto.assemble(pypto.mul(buffer, 2.0), [0, 0], joined)
    pypto.assemble(_half(pypto, x, dims, half), [0, half], joined)
    out[:] = _result(pypto, joined)


@legal
def spoiled_buffer_repaired(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """The same, where the spoiled whole is not assembled."""
    buffer, half = _buffer(pypto, dims.B, dims.H), dims.H // 2
    pypto.assemble(_half(pypto, x, dims, 0), [0, 0], buffer)
    joined = pypto.tensor([dims.B, dims.H], pypto.DT_FP32, "joined")
    joined[:] = pypto.mul(buffer, 2.0)
    pypto.assemble(_half(pypto, x, dims, half), [0, half], joined)
    out[:] = _result(pypto, joined)


@legal
def half_replaced_after_a_loop(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A buffer that was whole before a loop is written in part after it, in a function that has not read it."""
    buffer, half = _buffer(pypto, dims.B, dims.H), dims.H // 2
    other = pypto.tensor([dims.B, dims.H], pypto.DT_BF16, "other")
    buffer[:] = pypto.cast(x, pypto.DT_FP32)
    for _ in pypto.loop(2, name="TRIP", idx_name="trip"):
        other[:] = pypto.mul(x, 3.0)
    pypto.assemble(_half(pypto, x, dims, half), [0, half], buffer)
    out[:] = _result(pypto, buffer)


@legal
def argument_updated(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """Half of an argument is written before all of it is read: the other half is the caller's."""
    pypto.assemble(pypto.view(_half(pypto, x, dims, 0), [1, dims.H // 2], [0, 0]), [0, 0], weight)
    out[:] = _result(pypto, pypto.mul(pypto.cast(x, pypto.DT_FP32), weight))


@legal
def half_of_a_carry_replaced(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A loop writes half of what was whole before it."""
    buffer = _buffer(pypto, dims.B, dims.H)
    buffer[:] = pypto.cast(x, pypto.DT_FP32)
    for _ in pypto.loop(2, name="TRIP", idx_name="trip"):
        pypto.assemble(pypto.add(pypto.view(buffer, [dims.B, dims.H // 2], [0, 0]), 1.0), [0, 0], buffer)
    out[:] = _result(pypto, buffer)


@legal
def whole_by_a_loop(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """Row by row, at offsets that only the loop knows."""
    buffer = _buffer(pypto, dims.B, dims.H)
    for b in pypto.loop(dims.B, name="ROW", idx_name="b"):
        pypto.assemble(pypto.cast(pypto.view(x, [1, dims.H], [b, 0]), pypto.DT_FP32), [b, 0], buffer)
    out[:] = _result(pypto, buffer)


@legal
def first_row_then_a_loop(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """The first row before the loop, the others in it."""
    buffer = _buffer(pypto, dims.B, dims.H)
    pypto.assemble(pypto.cast(pypto.view(x, [1, dims.H], [0, 0]), pypto.DT_FP32), [0, 0], buffer)
    for b in pypto.loop(1, dims.B, 1, name="ROW", idx_name="b"):
        pypto.assemble(pypto.cast(pypto.view(x, [1, dims.H], [b, 0]), pypto.DT_FP32), [b, 0], buffer)
    out[:] = _result(pypto, buffer)


@legal
def whole_by_branches(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """One half in the first trip, the other in the second."""
    buffer, half = _buffer(pypto, dims.B, dims.H), dims.H // 2
    for trip in pypto.loop(2, name="TRIP", idx_name="trip"):
        if pypto.cond(pypto.is_loop_begin(trip)):
            pypto.assemble(_half(pypto, x, dims, 0), [0, 0], buffer)
        else:
            pypto.assemble(_half(pypto, x, dims, half), [0, half], buffer)
    out[:] = _result(pypto, buffer)


@legal
def written_in_one_branch_and_read_in_another(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """The first trip writes the half that is missing, the second reads all."""
    buffer, half = _buffer(pypto, dims.B, dims.H), dims.H // 2
    pypto.assemble(_half(pypto, x, dims, 0), [0, 0], buffer)
    for trip in pypto.loop(2, name="TRIP", idx_name="trip"):
        if pypto.cond(pypto.is_loop_begin(trip)):
            pypto.assemble(_half(pypto, x, dims, half), [0, half], buffer)
        else:
            out[:] = _result(pypto, buffer)


@legal
def repaired_by_a_later_trip(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """The first trip's output is garbage in part, and the second trip writes all of it again."""
    buffer, half = _buffer(pypto, dims.B, dims.H), dims.H // 2
    pypto.assemble(_half(pypto, x, dims, 0), [0, 0], buffer)
    for _ in pypto.loop(2, name="TRIP", idx_name="trip"):
        out[:] = _result(pypto, buffer)
        pypto.assemble(_half(pypto, x, dims, half), [0, half], buffer)


@legal
def repaired_by_another_function(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """What garbage got into an output is written again after a loop."""
    buffer, other = _buffer(pypto, dims.B, dims.H), pypto.tensor([dims.B, dims.H], pypto.DT_BF16, "other")
    pypto.assemble(_half(pypto, x, dims, 0), [0, 0], buffer)
    out[:] = _result(pypto, buffer)
    for _ in pypto.loop(2, name="TRIP", idx_name="trip"):
        other[:] = pypto.mul(x, 3.0)
    out[:] = pypto.mul(other, 2.0)


@fault
def padding_summed(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A row sum goes over the padding too."""
    buffer = _buffer(pypto, dims.B, dims.H + 64)
    pypto.assemble(pypto.cast(x, pypto.DT_FP32), [0, 0], buffer)
    total = pypto.sum(buffer, -1, True)  # the read
    out[:] = _result(pypto, pypto.sub(pypto.cast(x, pypto.DT_FP32), total))


@fault
def half_read_whole(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """The right half is never written."""
    buffer = _buffer(pypto, dims.B, dims.H)
    pypto.assemble(_half(pypto, x, dims, 0), [0, 0], buffer)
    doubled = pypto.mul(buffer, 2.0)  # the read
    out[:] = pypto.cast(doubled, pypto.DT_BF16)


@fault
def one_column_too_far(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A view begins one column before what is written."""
    buffer = _buffer(pypto, dims.B, dims.H + 64)
    pypto.assemble(pypto.cast(x, pypto.DT_FP32), [0, 64], buffer)
    shifted = pypto.view(buffer, [dims.B, dims.H], [0, 63])  # the read
    out[:] = _result(pypto, shifted)


@fault
def gap_in_a_list(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """Two quarters with a gap between them."""
    buffer, quarter = _buffer(pypto, dims.B, dims.H), dims.H // 4
    pieces = [pypto.cast(pypto.view(x, [dims.B, quarter], [0, start]), pypto.DT_FP32) for start in (0, quarter)]
    pypto.assemble([(pieces[0], [0, 0]), (pieces[1], [0, 3 * quarter])], buffer, parallel=True)
    doubled = pypto.mul(buffer, 2.0)  # the read
    out[:] = pypto.cast(doubled, pypto.DT_BF16)


@fault
def padding_of_k(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A product goes over columns that pad the depth."""
    padded = pypto.tensor([dims.B, 2 * dims.H], pypto.DT_BF16, "buffer")
    pypto.assemble(pypto.mul(x, 1.0), [0, 0], padded)
    square = pypto.matmul(x, x, pypto.DT_BF16, a_trans=True)
    product = pypto.matmul(padded, pypto.concat([square, square], 0), pypto.DT_FP32)  # the read
    out[:] = _result(pypto, product)


@fault
def rows_folded(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """Rows are folded into one another, those that nothing wrote among them."""
    buffer = _buffer(pypto, 2 * dims.B, dims.H)
    pypto.assemble(pypto.cast(x, pypto.DT_FP32), [0, 0], buffer)
    folded = pypto.reshape(buffer, [dims.B, 2 * dims.H])  # the read
    out[:] = _result(pypto, pypto.view(folded, [dims.B, dims.H], [0, 0]))


@fault
def padding_in_each_row(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A loop over rows; each has a buffer of its own, and all that is written to the output is spoiled."""
    for b in pypto.loop(dims.B, name="ROW", idx_name="b"):
        buffer = _buffer(pypto, 1, dims.H + 64)
        row = pypto.cast(pypto.view(x, [1, dims.H], [b, 0]), pypto.DT_FP32)
        pypto.assemble(row, [0, 0], buffer)
        total = pypto.sum(buffer, -1, True)  # the read
        pypto.assemble(_result(pypto, pypto.div(row, total)), [b, 0], out)


@fault
def half_cleared_accumulator(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A loop adds to a buffer of which only the left half was written before it."""
    buffer = _buffer(pypto, dims.B, dims.H)
    pypto.assemble(pypto.full([dims.B, dims.H // 2], 0.0, pypto.DT_FP32), [0, 0], buffer)
    for _ in pypto.loop(3, name="TRIP", idx_name="trip"):
        buffer[:] = pypto.add(buffer, pypto.cast(x, pypto.DT_FP32))  # the read
    out[:] = _result(pypto, buffer)


@fault
def never_written(pypto: Any, x: Any, weight: Any, out: Any, dims: Dims) -> None:
    """A buffer is read that nothing writes at all."""
    buffer = _buffer(pypto, dims.B, dims.H)
    doubled = pypto.mul(buffer, 2.0)  # the read
    out[:] = pypto.cast(doubled, pypto.DT_BF16)
