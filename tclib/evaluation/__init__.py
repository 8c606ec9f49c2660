"""How good a transcoder is: metrics, intervals, fair comparisons, ground truth, and how much a seed changes."""

from tclib.evaluation.faithfulness import cross_entropy, faithfulness
from tclib.evaluation.measure import (
    DENSE,
    MEAN_ROWS,
    Measured,
    check,
    cumulative,
    evaluate,
    in_place,
    measure,
    reconstruction,
    replacement,
)

__all__ = [
    "DENSE",
    "MEAN_ROWS",
    "Measured",
    "check",
    "cross_entropy",
    "cumulative",
    "evaluate",
    "faithfulness",
    "in_place",
    "measure",
    "reconstruction",
    "replacement",
]
