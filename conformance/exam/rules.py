"""The rules by which other projects accept a kernel's output, each as its project publishes it, blind spots included.

They stand here to be measured beside our own rule, so none is improved: where one lets a NaN or a wrong token id pass, so
does this. A project's order of arguments, precision of arithmetic and choice of reference decide borderline outputs, and are
kept too: most compare with the golden, OpenCL with the exact value, FlashAttention with what torch in bf16 gets wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch

from conformance.errors import UsageError
from conformance.numerics.ulp import distance, spacing

BF16 = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Compared:
    """One output of one run beside what it is compared with; all four tensors have one shape.

    ``found`` is what the kernel left, in the contract's dtype (bf16, fp32 or int32). ``golden`` is the contract computed in
    fp64 with its bf16 rounding points and then cast to that dtype; ``exact`` the same in fp64 without any rounding; ``rough``
    what an ordinary torch implementation gives that keeps every intermediate in bf16, in the contract's dtype.
    """

    name: str
    found: torch.Tensor
    golden: torch.Tensor
    exact: torch.Tensor
    rough: torch.Tensor


Judge = Callable[[Compared], bool]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A published rule: a short id, who judges so, the rule in one line, and where it is published.

    ``accepts`` decides about one output and never raises; a run passes if every output is accepted.
    """

    name: str
    system: str
    definition: str
    source: str
    accepts: Judge


def _identical(compared: Compared) -> bool:
    return torch.equal(compared.found, compared.golden)


def _judge(floats: Judge, integers: Judge = _identical) -> Judge:
    """The judge of a whole output. Integers are token ids, which suites compare exactly unless their rule says otherwise.

    Pages of a cache that nobody owns hold NaN before and after a run. Suites that compare such a cache ask for ``equal_nan``:
    where the golden is NaN so must the result be; the rest a rule sees without NaN, which would dilute its shares.
    """

    def accepts(compared: Compared) -> bool:
        owned = ~compared.golden.isnan()
        if not owned.all():
            if not compared.found[~owned].isnan().all():
                return False
            rows = owned.any(-1)  # whole rows if possible: a rule may look at the size of a row
            kept = rows if owned[rows].all() else owned
            tensors = (compared.found, compared.golden, compared.exact, compared.rough)
            compared = Compared(compared.name, *(tensor[kept] for tensor in tensors))
        if compared.golden.numel() == 0:
            return True
        return floats(compared) if compared.golden.is_floating_point() else integers(compared)

    return accepts


Tolerances = Mapping[torch.dtype, tuple[float, float]]

#: Relative and absolute tolerance by dtype.
TORCH: Tolerances = {BF16: (1.6e-2, 1e-5), torch.float32: (1.3e-6, 1e-5)}
VLLM: Tolerances = {BF16: (1.6e-2, 1e-3), torch.float32: (1.3e-6, 1e-5)}


def _close(compared: Compared, tolerances: Tolerances) -> bool:
    """Computed in the output's own dtype, as ``torch.testing`` does: the tolerance itself is rounded to bf16."""
    rtol, atol = tolerances[compared.found.dtype]
    return torch.allclose(compared.found, compared.golden, rtol, atol)


def _kernelbench(compared: Compared) -> bool:
    """The kernel's output stands second, so the tolerance grows with what was found instead of what was expected.

    The tolerance goes by the precision of the run, which is bf16 in every stage, and not by the dtype of an output; token ids
    are compared with it like any other output.
    """
    return torch.allclose(compared.golden, compared.found, rtol=1e-2, atol=1e-2)


def _outliers(compared: Compared, tolerance: float, share: float) -> bool:
    """NaN and infinities are no outliers: one anywhere fails. How far off an outlier is does not matter."""
    found, golden = compared.found.float(), compared.golden.float()
    if not (found.isfinite().all() and golden.isfinite().all()):
        return False
    wrong = (found - golden).abs() > tolerance + tolerance * golden.abs()
    return int(wrong.sum()) <= round(share * wrong.numel())


def _pass_rate(compared: Compared, tolerance: float, share: float) -> bool:
    """A NaN or an infinity is one wrong element like any other."""
    close = torch.isclose(compared.found, compared.golden, tolerance, tolerance)
    return float(close.float().mean()) >= share


def _argmax(compared: Compared) -> bool:
    """The test of the whole model looks at nothing but its logits and token ids; other outputs have the test of one layer."""
    if compared.name != "logits":
        return _outliers(compared, 3e-3, 0.02)
    return torch.equal(compared.found.argmax(-1), compared.golden.argmax(-1))


def _twice_torch(compared: Compared, floor: Callable[[torch.Tensor], float]) -> bool:
    """Errors are taken in the output's dtype, from a reference rounded to it. A NaN compares false on either side.

    Its users have no fp32 outputs; the rule scales itself by what torch gets wrong, so it is applied to them unchanged.
    """
    golden = compared.golden
    error, rough_error = (_largest(tensor - golden) for tensor in (compared.found, compared.rough))
    return error <= 2 * rough_error + floor(golden)


def _largest(error: torch.Tensor) -> float:
    return float(error.abs().max())


def _arithmetic_noise(golden: torch.Tensor) -> float:
    """What adding and subtracting 0.3 does to the reference, twice: a few ULPs of its large elements."""
    return 2 * _largest(golden + 0.3 - 0.3 - golden)


def _calc_diff(compared: Compared, limit: float) -> bool:
    """A NaN gives NaN, which is not below the limit."""
    found, golden = compared.found.double(), compared.golden.double()
    squares = float((found * found + golden * golden).sum())
    if squares == 0:
        return True
    return 1 - 2 * float((found * golden).sum()) / squares < limit


def _cosine(compared: Compared) -> bool:
    """Its guard against division by zero makes all zeros differ from all zeros; a NaN gives NaN."""
    found, golden = compared.found.float().flatten(), compared.golden.float().flatten()
    return float(torch.nn.functional.cosine_similarity(golden, found, dim=0)) > 0.999


def _flashinfer_bench(compared: Compared) -> bool:
    """Tokens have an evaluator of their own there, which asks that they are among those allowed: for a greedy choice, equal."""
    found, golden = compared.found.float(), compared.golden.float()
    error = (found - golden).abs()
    wrong = (error > 1e-2) & (error / (golden.abs() + 1e-8) > 1e-2)
    return bool(found.isfinite().all()) and not bool(wrong.any())


#: The loosest entry among the functions that the stages are made of (exp; rsqrt has 2 and 1, a division 2.5 and 1, sums and
#: products 0), because an output is a composition and the table knows none. It has no bf16: half precision's column stands in.
OPENCL_ULPS = {torch.float32: 3.0, BF16: 2.0}


def _opencl(compared: Compared) -> bool:
    """A ULP is that of the exact value, the smaller of the two at a power of two. An infinity counts as ``2**128``."""
    found, exact, dtype = compared.found.double(), compared.exact, compared.found.dtype
    ulp = spacing(torch.nextafter(exact, torch.zeros_like(exact)), dtype)
    error = (found.nan_to_num(nan=math.nan, posinf=2.0**128, neginf=-(2.0**128)) - exact).abs() / ulp
    return bool(((error <= OPENCL_ULPS[dtype]) | (compared.found == exact.to(dtype))).all())


def _pearson(compared: Compared) -> bool:
    """NaN and infinities are set to 0 before correlating. Where a tensor is constant, a comparison of elements decides.

    Integers are correlated too: token ids are compared like this in its argmax test.
    """
    found, golden = compared.found, compared.golden
    # Four bf16 epsilons; the absolute tolerance is the same for all.
    rtol = 2.0**-5 if golden.dtype == BF16 else 1e-5
    if bool(found.isnan().all()):
        return False
    if bool(found.any()) != bool(golden.any()):
        return torch.allclose(golden, found, rtol, 1e-4)
    found, golden = (tensor.float().nan_to_num(0.0, 0.0, 0.0) for tensor in (found, golden))
    x, y = (tensor.double() - tensor.mean(dtype=torch.float64) for tensor in (found, golden))
    correlation = float((x * y).sum() / ((x * x).sum() * (y * y).sum()).sqrt())
    return torch.allclose(golden, found, rtol, 1e-4) if math.isnan(correlation) else correlation >= 0.9999


def _ttnn_ulps(compared: Compared) -> bool:
    """A ULP is that of the golden, so ten of them are a hair where it is near 0."""
    found, golden = compared.found.double(), compared.golden.double()
    return bool(((found - golden).abs() <= 10 * spacing(golden, compared.golden.dtype)).all())


def _bf16_ulps(compared: Compared, ulps: int, floor: bool = False) -> bool:
    """ULPs of bf16 for fp32 outputs as well: those are sums of bf16 values, and no other order of summation is within 2 of fp32.

    The floor is as many half ULPs of a bf16 value as large as the row's root mean square.
    """
    found, golden = compared.found.double(), compared.golden.double()
    right = distance(found, golden, BF16) <= ulps
    if floor:
        right |= (found - golden).abs() <= ulps * 2.0**-9 * golden.square().mean(-1, keepdim=True).sqrt()
    return bool(right.all())


RULES: tuple[Rule, ...] = (
    Rule(
        "assert_close",
        "torch.testing",
        "every element within rtol 1.6e-2, atol 1e-5 (bf16), 1.3e-6, 1e-5 (fp32); integers equal; NaN fails",
        "pytorch torch/testing/_comparison.py, default tolerances",
        _judge(partial(_close, tolerances=TORCH)),
    ),
    Rule(
        "98% within 3e-3",
        "pypto-lib",
        "at most 2% of the elements beyond 3e-3 + 3e-3 |golden|, in fp32; NaN or infinity fails",
        "pypto-lib, decode_fwd.py and golden/validation.py: ratio_allclose",
        _judge(partial(_outliers, tolerance=3e-3, share=0.02)),
    ),
    Rule(
        "99.5% within 3e-3",
        "pypto-lib",
        "the same with at most 0.5% of the elements beyond",
        "pypto-lib golden/validation.py, default share of ratio_allclose; tolerance of the decode tests",
        _judge(partial(_outliers, tolerance=3e-3, share=0.005)),
    ),
    Rule(
        "98% within 5e-3",
        "pypto-lib",
        "at least 98% of the elements within rtol = atol = 5e-3; NaN and infinity are wrong elements",
        "pypto-lib, decode_tq_draft.py: make_pass_rate_compare",
        _judge(partial(_pass_rate, tolerance=5e-3, share=0.98)),
    ),
    Rule(
        "argmax of logits",
        "pypto-lib",
        "logits: the largest of every row at the golden's place; token ids equal; other outputs 98% within 3e-3",
        "pypto-lib, decode_fwd.py: --validate-fwd",
        _judge(_argmax),
    ),
    Rule(
        "2x torch + 1e-5",
        "FlashAttention 2",
        "largest error at most twice that of a torch implementation in bf16, + 1e-5",
        "flash-attention tests/test_flash_attn.py",
        _judge(partial(_twice_torch, floor=lambda golden: 1e-5)),
    ),
    Rule(
        "2x torch + noise",
        "FlashAttention 3, 4",
        "largest error at most twice that of a torch implementation in bf16, + twice the error of golden + 0.3 - 0.3",
        "flash-attention hopper/test_flash_attn.py, tests/cute/test_flash_attn.py",
        _judge(partial(_twice_torch, floor=_arithmetic_noise)),
    ),
    Rule(
        "calc_diff < 1e-3",
        "DeepGEMM",
        "1 - 2<x,y> / (|x|**2 + |y|**2) below 1e-3 over the whole tensor; all zeros against all zeros passes",
        "DeepGEMM deep_gemm/testing/numeric.py, limit of tests/test_fp8_fp4.py and test_attention.py",
        _judge(partial(_calc_diff, limit=1e-3)),
    ),
    Rule(
        "calc_diff < 1e-5",
        "DeepGEMM",
        "the same below 1e-5",
        "DeepGEMM deep_gemm/testing/numeric.py, limit of tests/test_bf16.py",
        _judge(partial(_calc_diff, limit=1e-5)),
    ),
    Rule(
        "allclose 1e-2",
        "KernelBench",
        "every element within 1e-2 + 1e-2 |found|, token ids too; NaN fails",
        "KernelBench src/kernelbench/eval.py, tolerance of bf16",
        _judge(_kernelbench, _kernelbench),
    ),
    Rule(
        "both over 1e-2",
        "flashinfer-bench",
        "no element whose absolute and whose relative error both exceed 1e-2, in fp32; NaN or infinity fails",
        "flashinfer-bench flashinfer_bench/bench/utils.py, evaluators/default.py",
        _judge(_flashinfer_bench),
    ),
    Rule(
        "vLLM defaults",
        "vLLM kernel tests",
        "every element within rtol 1.6e-2, atol 1e-3 (bf16), 1.3e-6, 1e-5 (fp32); NaN fails",
        "vllm tests/kernels/allclose_default.py",
        _judge(partial(_close, tolerances=VLLM)),
    ),
    Rule(
        "OpenCL ULPs",
        "OpenCL CTS",
        "every element within 3 ULPs (fp32) or 2 (bf16) of the exact value: what exp may be off by",
        "OpenCL-CTS test_conformance/math_brute_force/function_list.cpp, test_common/harness/errorHelpers.cpp",
        _judge(_opencl),
    ),
    Rule(
        "PCC >= 0.9999",
        "tt-metal",
        "Pearson correlation over the whole tensor at least 0.9999, NaN and infinity taken as 0",
        "tt-metal tests/ttnn/utils_for_testing.py assert_with_pcc, ttnn/ttnn/comparison.py",
        _judge(_pearson, _pearson),
    ),
    Rule(
        "10 ULPs",
        "tt-metal",
        "every element within 10 ULPs of the golden, in ULPs of the golden's dtype; NaN or infinity fails",
        "tt-metal tests/ttnn/utils_for_testing.py assert_with_ulp, ttnn/ttnn/comparison.py",
        _judge(_ttnn_ulps),
    ),
    Rule(
        "cosine > 0.999",
        "SGLang",
        "cosine similarity over the whole tensor above 0.999; NaN fails",
        "sglang python/sglang/jit_kernel/tests/test_bmm_fp8.py, one kernel against another; against torch it asks 0.99",
        _judge(_cosine),
    ),
    Rule(
        "2 bf16 ULPs",
        "common practice",
        "every element within 2 bf16 ULPs of the golden; NaN fails",
        "a rule of thumb, of no single project",
        _judge(partial(_bf16_ulps, ulps=2)),
    ),
    Rule(
        "8 bf16 ULPs + floor",
        "common practice",
        "every element within 8 bf16 ULPs of the golden or within 2**-6 of its row's root mean square; NaN fails",
        "a rule of thumb, of no single project",
        _judge(partial(_bf16_ulps, ulps=8, floor=True)),
    ),
)


def rule_named(name: str) -> Rule:
    """The rule of that name; raises ``UsageError`` that lists the known ones."""
    known = {rule.name: rule for rule in RULES}
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"unknown rule {name!r}; known are {', '.join(known)}")
    return known[name]
