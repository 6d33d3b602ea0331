"""Values that follow from a key: the distributions they claim, and the same on every machine."""

from __future__ import annotations

import decimal
import math

import pytest
import torch

from conformance.cases.source import GRID_STD, Source
from conformance.kernels.qwen3.rotation import rotation_table


def test_a_tensor_does_not_depend_on_what_was_drawn_before() -> None:
    one, other = Source("key"), Source("key")
    other.normal("something else", (7, 3))
    assert torch.equal(one.normal("x", (4, 5)), other.normal("x", (4, 5)))


def test_names_and_keys_give_different_values() -> None:
    x = Source("key").normal("x", (100,))
    assert not torch.equal(x, Source("key").normal("y", (100,)))
    assert not torch.equal(x, Source("yek").normal("x", (100,)))


def test_normal_values_are_bell_shaped() -> None:
    x = Source("key").normal("x", (400, 500))
    assert x.dtype == torch.float64
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.std()) - 1) < 0.01
    assert 3 < float(x.abs().max()) <= 3.5
    assert abs(float((x.abs() < 1).double().mean()) - 0.67) < 0.02


@pytest.mark.parametrize("scale", [1.0, 2.0**-5, 16.0])
def test_grid_values_are_bf16_with_the_standard_deviation_they_claim(scale: float) -> None:
    x = Source("key").grid("x", (300, 401), scale)
    assert x.dtype == torch.bfloat16
    assert abs(float(x.float().std()) / (scale * GRID_STD) - 1) < 0.01
    assert abs(float(x.float().mean())) < 0.01 * scale


def test_sums_of_products_of_grid_values_are_exact_in_any_order() -> None:
    x, weight = Source("key").grid("x", (8, 1000), 1.0).double(), Source("key").grid("w", (1000, 8), 1000**-0.5).double()
    order = Source("key").permutation("order", 1000)
    assert torch.equal(x @ weight, x[:, order] @ weight[order])


def test_a_grid_made_in_chunks_is_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Source("key").grid("x", (1000,), 1.0)
    monkeypatch.setattr("conformance.cases.source._CHUNK", 96)
    assert torch.equal(Source("key").grid("x", (1000,), 1.0), whole)


def test_an_odd_count_is_the_beginning_of_a_longer_one() -> None:
    assert torch.equal(Source("key").grid("x", (7,), 1.0), Source("key").grid("x", (20,), 1.0)[:7])


def test_integers_reach_both_ends() -> None:
    assert set(Source("key").integers("n", 3, 6, 200)) == {3, 4, 5, 6}
    assert Source("key").integers("n", 5, 5, 3) == [5, 5, 5]


def test_a_permutation_holds_every_number_once() -> None:
    found = Source("key").permutation("p", 50)
    assert sorted(found) == list(range(50))
    assert found != list(range(50))


def test_uniform_values_are_below_one() -> None:
    x = Source("key").uniform("x", (100000,))
    assert 0 <= float(x.min()) < 1e-3
    assert 1 - 1e-3 < float(x.max()) < 1
    assert abs(float(x.mean()) - 0.5) < 0.005


@pytest.mark.parametrize(("positions", "head_dim"), [(128, 64), (76, 32), (4096, 128), (1, 2)])
def test_the_rotation_table_is_the_rope_table(positions: int, head_dim: int) -> None:
    cosine, sine = rotation_table(positions, head_dim, 1e6)
    angle = torch.arange(positions).double().unsqueeze(1) * 1e6 ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    assert torch.allclose(cosine, torch.cat([angle.cos()] * 2, -1), rtol=0, atol=1e-12)
    assert torch.allclose(sine, torch.cat([angle.sin()] * 2, -1), rtol=0, atol=1e-12)


def test_the_rotation_table_is_right_to_the_last_place_of_fp32() -> None:
    """Against 40 digits, at the last of 4096 positions, where an error of the base angle is multiplied most."""
    cosine, sine = rotation_table(4096, 128, 1e6)
    with decimal.localcontext() as context:
        context.prec = 40
        for pair in (0, 1, 17, 63):
            step = (decimal.Decimal("1e6").ln() * (-2 * pair) / 128).exp()
            turn = decimal.Decimal("6.2831853071795864769252867665590057683943")
            angle = float((4095 * step) % turn)
            assert math.isclose(float(cosine[4095, pair]), math.cos(angle), rel_tol=0, abs_tol=1e-15)
            assert math.isclose(float(sine[4095, pair]), math.sin(angle), rel_tol=0, abs_tol=1e-15)
