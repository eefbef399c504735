"""The convolution chain's raw ops, ``narrowdeep::cnn_forward``, ``_backward``, ``_jvp``: ``narrowdeep.ops.chain``.

``x`` is (B, C, H, W); the six parameters are stacked as in ``narrowdeep.DeepNarrowCNN``. The CPU engine (``csrc/``)
and the Triton kernels implement them; ``reference.py`` says what they compute.
"""

from __future__ import annotations

from narrowdeep.ops import chain, engine, triton_dispatch

ops = chain.define("cnn")
engine.load()
triton_dispatch.register_chain(chain.library, "cnn")

import warnings  # TEMPORARY

from narrowdeep.ops.cnn import layered  # TEMPORARY

with warnings.catch_warnings():  # TEMPORARY
    warnings.simplefilter("ignore")
    for _name in ("forward", "backward", "jvp"):
        chain.library.impl(f"cnn_{_name}", getattr(layered, f"cnn_{_name}"), "CPU")
