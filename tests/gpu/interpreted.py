"""Run by test_interpreter.py in a process with TRITON_INTERPRET=1: prints one line of JSON a case."""

from __future__ import annotations

import json

import torch

from narrowdeep.ops.cnn import triton as cnn
from narrowdeep.ops.gram import triton as gram
from narrowdeep.ops.mlp import triton as mlp
from tests.gpu.cases import ALL_GIVEN, Case, GramCase, Ops, SecondCase, check, check_gram, check_second

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
    Case(1, 1, 35, 2, True, F64, 4, image=(1, 2)),
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
SECONDS = [
    SecondCase(Case(1, 1, 2, 5, True, F64, 0)),  # no hidden layer
    SecondCase(Case(1, 1, 3, 0, False, F64, 0)),  # no sample
    SecondCase(Case(1, 1, 3, 1, False, F32, 0)),
    SecondCase(Case(1, 1, 37, 5, True, F64, 0)),
    SecondCase(Case(1, 1, 37, 4, True, F32, 0), first=False, last=False, start=29),
    SecondCase(Case(2, 1, 9, 33, False, F32, 0, width=2), first=False, start=2**40 + 5),
    SecondCase(Case(1, 2, 12, 7, True, F64, 0), last=False),
    SecondCase(Case(3, 1, 7, 3, False, F64, 0, width=16), last=False),
    SecondCase(Case(10, 6, 36, 3, True, F32, 0), first=False),
    SecondCase(Case(1, 1, 36, 2, True, F64, 0, image=(2, 1))),
    SecondCase(Case(1, 1, 9, 2, True, F32, 0, image=(2, 2)), first=False, last=False, start=27),
    SecondCase(Case(2, 1, 4, 3, False, F32, 0, image=(2, 5), width=2), first=False),
    SecondCase(Case(1, 1, 3, 1, False, F64, 0, image=(4, 3), tap=5), last=False),
    # Without each of the tangents, and with it alone.
    *(SecondCase(Case(1, 1, 5, 3, True, F64, 0), given=ALL_GIVEN ^ 1 << i) for i in range(8)),
    *(SecondCase(Case(1, 1, 4, 3, False, F64, 0), given=1 << i) for i in range(8)),
    *(SecondCase(Case(1, 1, 4, 2, True, F64, 0, image=(2, 1)), given=ALL_GIVEN ^ 0b10001 << i) for i in (0, 1)),
    SecondCase(Case(1, 1, 6, 3, True, F64, 0), first=False, last=False, start=30, given=0b10000),
    SecondCase(Case(1, 1, 6, 3, True, F64, 0), given=0),
]
MLP: Ops = (mlp.mlp_forward, mlp.mlp_backward, mlp.mlp_jvp)
CNN: Ops = (cnn.cnn_forward, cnn.cnn_backward, cnn.cnn_jvp)


def main() -> None:
    cases: list[Case | GramCase | SecondCase] = [*CASES, *GRAMS, *SECONDS]
    for case in cases:
        try:
            if isinstance(case, GramCase):
                check_gram(case, gram.cnn_gram if case.case.image else gram.mlp_gram)
            elif isinstance(case, SecondCase):
                check_second(case, cnn.cnn_backward_jvp if case.case.image else mlp.mlp_backward_jvp)
            else:
                check(case, CNN if case.image else MLP)
            failure = None
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"
        print(json.dumps({"case": str(case), "failure": failure}), flush=True)


if __name__ == "__main__":
    main()
