"""Run the Triton kernels of FAVOR+ on a CPU, in Triton's interpreter: python favor_interpreted.py INPUTS OUTPUTS.

INPUTS holds q, k, v, gradient and projection of several cases, OUTPUTS attention and gradients of each. A program of
its own, because Triton looks once, when it is imported, whether it is to interpret.
"""

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from model import favor_triton, performer


def run(q, k, v, gradient, projection):
    scaled = performer._scaled(projection)
    out, largest, context, denominator = favor_triton.forward(q, k, v, scaled, performer.EPSILON, fast=False)
    kept = largest, context, out, denominator
    return out, *favor_triton.backward(gradient, q, k, v, scaled, *kept, performer.EPSILON, fast=False)


if __name__ == "__main__":
    cases = torch.load(sys.argv[1])
    torch.save({name: run(*case) for name, case in cases.items()}, sys.argv[2])
