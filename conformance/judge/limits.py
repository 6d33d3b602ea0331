"""The constants of the rule, each with its reason."""

from __future__ import annotations

import math

import torch

from conformance.judge.sensitivity import chi_square_mean

#: Probability that a correct tensor has an element beyond its allowance: sets kappa (docs/rule.md, Element).
FALSE_ALARM = 1e-6


#: Relative slack on the half ULP of the last rounding: kernels that round through fp32 miss ties by this much.
HALF_ULP_SLACK = 1 + 2.0**-12


#: What flushing subnormals to zero may cost.
FLUSHED = 2.0**-126


#: Spread: 5.5 standard deviations of a chi-square mean (Wilson-Hilferty), and 10% for what the model leaves out
#: (docs/rule.md, Spread).
SPREAD_SIGMAS = 5.5


SPREAD_SLACK = 1.1


#: A known mistake is believed where the errors along its signature exceed 5.5 standard deviations, and half of what it adds
#: (docs/rule.md, Matched filters).
SIGNATURE_SIGMAS = 5.5


SIGNATURE_PART = 0.5


#: The same of all cases together. A kernel that rounds elsewhere than a signature takes for granted adds less than that says,
#: two thirds at least of what was tried. What legal kernels do in all cases alike, such as where their ties go, does not average
#: out: in long runs the part alone tells it from a mistake (docs/rule.md, Pooling).
POOLED_SIGMAS = 5.5


POOLED_PART = 0.35


#: Elements of all inputs up to which signatures are made, twice what ``tiny`` has in its largest cases. Some 50 evaluations
#: of the reference and as many gradients take half a minute there, and would take a real layer many.
MOST_INPUTS = 10_000_000


#: Columns of a tile: what one NPU instruction writes.
TILE = 16


#: Bias: 6 standard deviations, and 2% of a rounding error per element (docs/rule.md, Bias).
BIAS_SIGMAS = 6.0


BIAS_SLACK = 0.02


#: Closer to a tie than this, in ULPs, the direction of a rounding says nothing about bias.
TIE_ULPS = 1e-5


#: How many areas that are too far off are looked at by themselves before all rows are counted, roughly, and how many after that.
MOST_AREAS = 8


#: How many elements that are too far off are looked at by themselves before they are believed, and how far they may be: none was
#: seen to vary by more than four times what the model says, which allows it twice as much.
MOST_ELEMENTS = 12


MOST_ELEMENT_SHARE = 4.0


#: A row with fewer different magnitudes than this says nothing statistical.
FEWEST_DISTINCT = 8


#: Elements looked at together: few enough that their float64 temporaries (256 KB each) stay in a core's cache, which is several
#: times faster than passes over whole tensors, and add nothing to speak of to the memory that an output takes.
BLOCK = 1 << 15


BF16 = torch.bfloat16


#: An error of an fp32 value that is more of its ULPs than this is told in those of bf16, of which it is a 64th.
MANY_ULPS_FP32 = 1024


#: Where more ULPs than this are legal they measure nothing: errors are told by the legal distance.
MANY_ULPS = 16


#: The dtypes of which spread and bias are judged. Not fp32: one rounding inside that falls on the other side moves a whole row by
#: many of its ULPs (``benchmarks/constants.py`` counts the correct runs that this would reject).
STATISTICAL = frozenset({BF16})


def kappa(count: int) -> float:
    """How many standard deviations the worst of ``count`` correct elements stays within, but for ``FALSE_ALARM``."""
    return math.sqrt(2 * math.log(2 * count / FALSE_ALARM))


def spread_limit(independent: torch.Tensor) -> torch.Tensor:
    """The largest mean square of scaled errors of a correct kernel, of which ``independent`` are independent."""
    return SPREAD_SLACK * chi_square_mean(independent.clamp_min(2), SPREAD_SIGMAS)
