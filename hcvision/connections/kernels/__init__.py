"""The update rule as kernels: in Triton for a GPU, in C for a CPU, and both as operators of PyTorch."""

from hcvision.connections.kernels import operators, triton

__all__ = ["operators", "triton"]
