"""PyPTO kernels whose verdict is known: faults that must be found and legal variants that must pass."""

from conformance.faults.subject import Subject
from kernels.qwen3.exam import faults, lost_carry, variants

SUBJECTS: tuple[Subject, ...] = (*faults.exam.subjects, *lost_carry.exam.subjects, *variants.exam.subjects)
