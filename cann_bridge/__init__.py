"""Decoding on an Ascend NPU through torch_npu: JAX arrays cross by DLPack, and torch custom ops compute.

Two ways in, over the same ops: `dense_ffn` and `sparse_ffn` inside jitted JAX, by callback, the weights found on the
device by handle; and `Decoder`, the whole decode step and loop there. torch and torch_npu are imported at first use.
"""

from cann_bridge.callbacks import dense_ffn, place_ffn, place_predictor, sparse_ffn
from cann_bridge.decoder import PAD, Decoder, LayerArrays, Spec
from cann_bridge.devices import device, unavailable

__all__ = [
    "PAD",
    "Decoder",
    "LayerArrays",
    "Spec",
    "dense_ffn",
    "device",
    "place_ffn",
    "place_predictor",
    "sparse_ffn",
    "unavailable",
]
