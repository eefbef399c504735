"""The figures, tables and theorems of the thesis as experiments, a file for each kind; ``narrowdeep reproduce``."""

from narrowdeep.experiments.accumulation import FIG_5_1
from narrowdeep.experiments.base import Context, Experiment, Store, Verdict, reproduce
from narrowdeep.experiments.initialisation import FIG_3_1, FIG_3_2
from narrowdeep.experiments.mnist_initialisation import FIG_4_2
from narrowdeep.experiments.mnist_table import TABLE_4_1
from narrowdeep.experiments.theorems import THEOREMS
from narrowdeep.experiments.toy import FIG_4_1

EXPERIMENTS: dict[str, Experiment] = {
    e.name: e for e in (FIG_3_1, FIG_3_2, FIG_4_1, FIG_4_2, TABLE_4_1, FIG_5_1, THEOREMS)
}
"""All experiments, in the order of the thesis."""

__all__ = ["EXPERIMENTS", "Context", "Experiment", "Store", "Verdict", "reproduce"]
