"""The MLP chain's raw ops, ``narrowdeep::mlp_forward``, ``_backward``, ``_jvp``: ``narrowdeep.ops.chain``.

``x`` is (B, in); the six parameters are stacked as in ``narrowdeep.DeepNarrowMLP``. The CPU engine (``csrc/``)
and the Triton kernels implement them; ``reference.py`` says what they compute.
"""

from __future__ import annotations

from narrowdeep.ops import chain, engine, triton_dispatch

ops = chain.define("mlp")
engine.load()
triton_dispatch.register_chain(chain.library, "mlp")

import warnings  # TEMPORARY

from narrowdeep.ops.mlp import layered  # TEMPORARY

with warnings.catch_warnings():  # TEMPORARY
    warnings.simplefilter("ignore")
    for _name in ("forward", "backward", "jvp"):
        chain.library.impl(f"mlp_{_name}", getattr(layered, f"mlp_{_name}"), "CPU")
