"""The probe: a kernel of known result that needs all of a card, to tell whether the card is well.

A wedged card may still do one addition of torch's: neither its AICPU nor all of its cores take part in that. Here the AICPU
schedules a matrix product (for a cube core) and an addition (for a vector core) for each of ``TILES`` tiles, more than any card
of the A2 and A3 series has cores. Numbers are small and whole, so the result is exact.
"""
# mypy: disable-error-code="valid-type,no-untyped-def,untyped-decorator"

from typing import TYPE_CHECKING, Any

import torch

from conformance.lanes.base import Outcome

if TYPE_CHECKING:
    from conformance.lanes.pypto.device import Device

#: Tiles of ``ROWS`` rows each, and columns. An A2 or A3 die has at most 25 cube and 50 vector cores.
TILES, ROWS, COLUMNS = 64, 16, 128


def build(pypto: Any) -> Any:
    """The kernel: ``out = a @ b + 1``."""
    rows = TILES * ROWS

    @pypto.frontend.jit()
    def conformance_probe(
        a: pypto.Tensor([rows, COLUMNS], pypto.DT_BF16),
        b: pypto.Tensor([COLUMNS, COLUMNS], pypto.DT_BF16),
        out: pypto.Tensor([rows, COLUMNS], pypto.DT_FP32),
    ):
        pypto.set_cube_tile_shapes([ROWS, ROWS], [COLUMNS, COLUMNS], [COLUMNS, COLUMNS])
        pypto.set_vec_tile_shapes(ROWS, COLUMNS)
        for tile in pypto.loop(TILES, name="tile"):
            part = pypto.view(a, [ROWS, COLUMNS], [tile * ROWS, 0])
            summed = pypto.add(pypto.matmul(part, b, pypto.DT_FP32), 1.0)
            pypto.assemble(summed, [tile * ROWS, 0], out)

    return conformance_probe


def probe_arguments() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``a``, ``b`` and ``out``, which nothing has been written to."""
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-1, 2, (rows, COLUMNS), generator=draw).to(torch.bfloat16) for rows in (TILES * ROWS, COLUMNS))
    return a, b, torch.full((TILES * ROWS, COLUMNS), torch.nan)


def probe_card(card: "Device", pypto: Any) -> Outcome:
    """Run the probe: an outcome that is not ``"ok"`` says what is wrong with the card."""
    a, b, out = probe_arguments()
    placed = [card.place(tensor.flatten()).view(tensor.shape) for tensor in (a, b, out)]
    card.launch(build(pypto), placed)
    found = card.read_back(placed[2])
    wrong = int((found != a.float() @ b.float() + 1).sum())
    if wrong:
        return Outcome("raised", message=f"the probe's result is wrong in {wrong} of {found.numel()} elements")
    return Outcome("ok")
