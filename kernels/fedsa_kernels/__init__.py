"""Adapter kernels. They know tensors and nothing of federated learning.

Every op has one public function, a plain-torch reference that is also the CPU path, Triton kernels,
and a ``README.md`` with its mathematics.
"""

from fedsa_kernels.chacha20 import KeystreamExhaustedError, chacha20_words
from fedsa_kernels.clipped_grad import (
    clipped_sum,
    sample_grad,
    sample_grad_with_norms,
    squared_norms,
)
from fedsa_kernels.dropout import keep_mask, layer_keys, row_keys, token_keys
from fedsa_kernels.lora_linear import lora_linear
from fedsa_kernels.lora_linears import lora_linears
from fedsa_kernels.quantize_mask import quantize_mask
from fedsa_kernels.vera_linear import vera_linear

__all__ = [
    "KeystreamExhaustedError",
    "chacha20_words",
    "clipped_sum",
    "keep_mask",
    "layer_keys",
    "lora_linear",
    "lora_linears",
    "quantize_mask",
    "row_keys",
    "sample_grad",
    "sample_grad_with_norms",
    "squared_norms",
    "token_keys",
    "vera_linear",
]
