"""Arcee Fusion by the paper's equations, which differ from its authors' code.

    S = KL(Left || Right) * (Left - Right)      one KL over the flattened tensor, the difference with its sign
    out = Right where S > T, else Left

The arithmetic is exact, as in arcee_fusion.

Source: TinyR1-32B-Preview (arXiv 2503.04872 v3), Eq. 1 and 7. Its Eq. 3 has ceil(max(0, S - T)) for the mask, which is
the same where S - T is at most 1; it is below 1e-6 on real experts.
"""

from dataclasses import dataclass

from branchmerge.merge.operators.arcee_fusion import ArceeFusion


@dataclass(frozen=True)
class ArceeFusionPaper(ArceeFusion):
    """Left and Right -> their fusion by the paper's equations; the parameters are those of arcee_fusion."""

    kl: str = "tensor"
    direction: str = "left_right"
    delta: str = "signed"
    gate: str = "gt"
