"""
bf16.py: run a script in bfloat16 as a CPU with AVX512-BF16 would, on one that has not got it.

    python .ci/bf16.py train.py --preset tiny --out out/bf16            a training
    python .ci/bf16.py .ci/benchmark.py --run out/bf16                  its marks

There PyTorch's own bfloat16 products take ten times as long. These take float32's time and a half: such a CPU multiplies
bfloat16 numbers, adds up in float32 and rounds the sum to bfloat16, and so does this, but for the order of the sum.
"""

import runpy
import sys
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten
PRODUCTS = {f.default for f in (aten.convolution, aten.convolution_backward, aten.mm, aten.addmm, aten.bmm, aten.baddbmm)}


class Products(TorchDispatchMode):
    """Products of bfloat16 tensors by way of float32."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function not in PRODUCTS or not any(torch.is_tensor(x) and x.dtype == torch.bfloat16 for x in args):
            return function(*args, **kwargs)
        wide = tree_map(lambda x: x.float() if torch.is_tensor(x) else x, (args, kwargs))
        return tree_map(lambda x: x.bfloat16() if torch.is_tensor(x) else x, function(*wide[0], **wide[1]))


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    torch.cpu._is_avx512_bf16_supported = lambda: True                 # what train.py asks before it takes bfloat16
    with Products():
        runpy.run_path(sys.argv[0], run_name="__main__")
