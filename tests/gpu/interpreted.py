"""Run by test_interpreter.py in a process with TRITON_INTERPRET=1: prints one line of JSON a case."""

from __future__ import annotations

import json

import torch

from narrowdeep.ops.cnn import triton as cnn
from narrowdeep.ops.gram import triton as gram
from narrowdeep.ops.mlp import triton as mlp
from tests.gpu.cases import Case, GramCase, Ops, check, check_gram

F32, F64 = torch.float32, torch.float64
CASES = [
    Case(1, 1, 2, 5, True, F32, 1),  # no hidden layer
    Case(1, 1, 3, 0, True, F64, 1),  # no sample
    Case(1, 1, 3, 1, False, F32, 50),
    Case(1, 1, 37, 5, True, F64, 5),
    Case(2, 1, 5, 33, False, F64, 1, width=2),
    Case(2, 2, 6, 7, True, F32, 0),
    Case(3, 1, 4, 5, False, F64, 2, width=17),
    Case(10, 6, 35, 3, True, F32, 6),
    Case(1, 1, 35, 2, True, F64, 4, image=(3, 2)),
    Case(2, 1, 4, 3, False, F32, 1, image=(2, 5), width=2),
    Case(1, 2, 3, 2, True, F32, 0, image=(1, 1), tap=1),
    Case(1, 1, 3, 1, True, F32, 2, image=(4, 3), tap=5),
]
GRAMS = [
    GramCase(Case(1, 1, 35, 5, True, F32, 0), 3, 0),
    GramCase(Case(1, 2, 4, 18, False, F64, 0), 0, 2),
    GramCase(Case(2, 1, 3, 3, True, F64, 0), 2, 1, trainable=0b110111),
    GramCase(Case(1, 1, 3, 0, True, F64, 0), 2, 0),
    GramCase(Case(1, 1, 3, 3, True, F32, 0, image=(3, 2)), 2, 0),
    GramCase(Case(1, 4, 4, 2, True, F64, 0, image=(1, 2)), 0, 2, trainable=0b101011),
    GramCase(Case(1, 1, 3, 1, False, F64, 0, image=(1, 2), width=2, tap=5), 3, 1, trainable=0b011110),
    GramCase(Case(1, 1, 3, 2, False, F32, 0, image=(1, 1), width=8, tap=1), 33, 0),
]
MLP: Ops = (mlp.mlp_forward, mlp.mlp_backward, mlp.mlp_jvp)
CNN: Ops = (cnn.cnn_forward, cnn.cnn_backward, cnn.cnn_jvp)


def main() -> None:
    cases: list[Case | GramCase] = [*CASES, *GRAMS]
    for case in cases:
        try:
            if isinstance(case, GramCase):
                check_gram(case, gram.cnn_gram if case.case.image else gram.mlp_gram)
            else:
                check(case, CNN if case.image else MLP)
            failure = None
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        print(json.dumps({"case": str(case), "failure": failure}), flush=True)


if __name__ == "__main__":
    main()
