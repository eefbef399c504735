"""The convolution chain's raw ops, ``narrowdeep::cnn_forward``, ``_backward``, ``_jvp``: ``narrowdeep.ops.chain``.

``x`` is (B, C, H, W); the six parameters are stacked as in ``narrowdeep.DeepNarrowCNN``. The CPU engine (``csrc/``)
and the Triton kernels implement them; ``reference.py`` says what they compute.
"""

from __future__ import annotations

from narrowdeep.ops import chain, engine, triton_dispatch

ops = chain.define("cnn", "DeepNarrowCNN")
engine.load()
triton_dispatch.register_chain(chain.library, "cnn")
