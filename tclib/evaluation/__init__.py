"""How good a transcoder is: metrics, intervals, fair comparisons, ground truth, and how much a seed changes.

The functions below measure. Import modules for the rest: `stats` (bootstrap and intervals), `fronts` (equal L0),
`baselines` (neurons, random directions), `ground_truth` (the generator's labels), `matching` (two training runs),
`yardsticks` (whatever ranks parts of a model).
"""

from tclib.evaluation.faithfulness import faithfulness
from tclib.evaluation.metrics import (
    DENSE,
    MEAN_ROWS,
    Measured,
    check,
    cumulative,
    evaluate,
    measure,
    reconstruction,
    replacement_hooks,
)

__all__ = [
    "DENSE",
    "MEAN_ROWS",
    "Measured",
    "check",
    "cumulative",
    "evaluate",
    "faithfulness",
    "replacement_hooks",
    "measure",
    "reconstruction",
]
