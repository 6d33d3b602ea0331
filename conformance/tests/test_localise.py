"""Which layer of a chain went wrong first, told from the cache rows that a wrong chain leaves."""

from __future__ import annotations

import pytest
import torch

from conformance.cases.case import Case, make_case
from conformance.cases.key import CaseKey
from conformance.contract.stage import layer_of
from conformance.kernels.qwen3 import localise, reference
from conformance.kernels.qwen3.layout import Layout
from conformance.numerics.arithmetic import CONTRACT

Tensor = torch.Tensor


#: A chain of each form: contiguous, with an LM head, on pages (some of them shared), and several tokens a sequence.
CASES = (
    "decode_fwd_layers:tiny:B=3,L=3,S=40,seq_lens=1+17+40:normal:5",
    "decode_fwd:tiny:B=3,L=3,S=40,seq_lens=1+17+40:normal:5",
    "paged_decode_fwd:tiny:B=3,L=3,S=40,NB=9,seq_lens=33+17+40:normal:2",
    "prefill_fwd:tiny:B=3,L=3,S=40,NB=9,seq_lens=5+17+40,chunk_lens=5+1+11:normal:5",
)


@pytest.fixture(scope="module", params=CASES, ids=[text.split(":")[0] for text in CASES])
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(CaseKey.parse(request.param))


class Chain:
    """A chain of layers whose states a test may spoil between layers."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.result = case.stage.outputs[-1].name
        self.outputs = {name: case.inputs[name].clone() for name in ("k_cache", "v_cache")}
        self.hidden = case.inputs["hidden_states"].double()

    def layer(self, number: int, hidden: Tensor | None = None, weights_of: int | None = None) -> Tensor:
        """Run one layer on ``hidden`` (the state so far, if not given), with another layer's weights if asked."""
        dims, inputs = self.case.dims, self.case.inputs
        chosen = number if weights_of is None else weights_of
        caches = [layer_of(self.outputs[name], number, dims.L) for name in ("k_cache", "v_cache")]
        start = self.hidden if hidden is None else hidden
        layout = Layout.of(inputs, dims.replace(L=1))
        weights = reference.weights_of(inputs, chosen, dims)
        k, v, self.hidden = reference.layer(start, weights, inputs, layout, *caches, a=CONTRACT)
        for cache, rows in zip(caches, (k, v), strict=True):
            cache.copy_(rows.to(torch.bfloat16))  # a view of outputs
        return self.hidden

    def causes(self, hidden: Tensor | None = None) -> list[str]:
        """What is said of the result that follows from ``hidden``, the last layer's if not given."""
        inputs, dims = self.case.inputs, self.case.dims
        state = self.hidden if hidden is None else hidden
        if self.result == "out":
            self.outputs["out"] = state.to(torch.bfloat16)
        else:
            last = state[Layout.of(inputs, dims).last]
            head = inputs["final_norm_weight"], inputs["lm_head_weight"]
            self.outputs["logits"] = reference.lm_head(last, *head, dims=dims, a=CONTRACT)[0].float()
        return localise.layers(inputs, self.outputs, dims)


def test_a_right_chain_has_no_cause(case: Case) -> None:
    chain = Chain(case)
    for number in range(3):
        chain.layer(number)
    assert chain.causes() == []


def test_a_layer_that_read_the_first_input(case: Case) -> None:
    chain = Chain(case)
    chain.layer(0)
    chain.layer(1)
    chain.layer(2, hidden=case.inputs["hidden_states"].double())
    (cause,) = chain.causes()
    assert cause.startswith("layer 2 read the first input")
    assert "did not see layer 1's output" in cause


def test_a_layer_that_read_the_state_before_the_last(case: Case) -> None:
    chain = Chain(case)
    old = chain.layer(0)
    chain.layer(1)
    chain.layer(2, hidden=old)
    assert chain.causes()[0].startswith("layer 2 read layer 0's output")


def test_a_layer_with_another_layers_weights(case: Case) -> None:
    chain = Chain(case)
    chain.layer(0)
    chain.layer(1, weights_of=2)
    chain.layer(2)
    assert chain.causes() == ["layer 1 used the weights of layer 2"]


@pytest.mark.parametrize("half", ["first", "second"])
def test_a_layer_that_saw_half_of_its_input(case: Case, half: str) -> None:
    chain = Chain(case)
    seen = chain.layer(0).clone()
    middle = case.dims.H // 2
    columns = slice(middle, None) if half == "first" else slice(0, middle)
    seen[:, columns] = 0
    chain.layer(1, hidden=seen)
    chain.layer(2)
    assert chain.causes()[0].startswith(f"layer 1 saw only the {half} half of layer 0's output, the rest was zeros")


def test_a_layer_that_read_zeros(case: Case) -> None:
    chain = Chain(case)
    chain.layer(0)
    chain.layer(1, hidden=torch.zeros_like(chain.hidden))
    chain.layer(2)
    assert chain.causes()[0].startswith("layer 1 read zeros")


def test_a_layer_that_did_not_run(case: Case) -> None:
    chain = Chain(case)
    chain.layer(0)
    chain.layer(2)
    assert chain.causes() == ["layer 1 wrote no cache rows"]


def test_a_state_that_nothing_explains(case: Case) -> None:
    chain = Chain(case)
    chain.layer(0)
    chain.layer(1, hidden=chain.hidden.flip(1))
    chain.layer(2)
    (cause,) = chain.causes()
    assert cause == "layer 1 is the first whose cache rows follow from no state that it could have read"


def test_only_the_result_is_wrong(case: Case) -> None:
    chain = Chain(case)
    chain.layer(0)
    earlier = chain.layer(1)
    chain.layer(2)
    about = "out is" if chain.result == "out" else "logits follow from"
    assert chain.causes(earlier) == [f"{about} layer 1's output, not layer 2's output"]
    assert chain.causes(case.inputs["hidden_states"].double()) == [f"{about} the first input, not layer 2's output"]
    assert chain.causes(chain.hidden.flip(1)) == ["every layer's cache rows are right, the fault lies behind those of layer 2"]


def test_rows_that_are_not_finite_match_nothing(case: Case) -> None:
    chain = Chain(case)
    for number in range(3):
        chain.layer(number)
    rows = Layout.of(case.inputs, case.dims).rows(layer=1)
    chain.outputs["v_cache"][rows[0], 0] = torch.nan
    (cause,) = chain.causes()
    assert cause.startswith("layer 1 is the first")


def test_one_token_of_a_chunk_is_enough() -> None:
    """The rest of the rows are right; so is the result, which follows from each sequence's last token."""
    case = make_case(CaseKey.parse(CASES[-1]))
    chain = Chain(case)
    chain.layer(0)
    layout = Layout.of(case.inputs, case.dims)
    inner = next(token for token in range(case.dims.T) if token not in layout.last.tolist())
    spoiled = chain.hidden.clone()
    spoiled[inner] = spoiled[inner].flip(0)
    chain.layer(1, hidden=spoiled)
    chain.layer(2)
    assert chain.causes() == ["layer 1 is the first whose cache rows follow from no state that it could have read"]


def test_a_fault_behind_the_rows_of_one_layer() -> None:
    for text, behind in (
        ("paged_decode_layer:tiny:B=2,S=40,NB=9,seq_lens=17+40:normal:5", "attention, output projection or MLP"),
        ("paged_decode_fwd:tiny:B=2,L=1,S=40,NB=9,seq_lens=17+40:normal:5", "attention, output projection, MLP or LM head"),
    ):
        chain = Chain(make_case(CaseKey.parse(text)))
        chain.layer(0)
        assert chain.causes(chain.hidden * 2 if chain.result == "out" else chain.hidden.flip(1)) == [
            f"the cache rows are right, the fault lies behind them: {behind}"
        ]
