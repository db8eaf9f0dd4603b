"""The ops in Triton, a module per op of kernels/ops, for tensors on a CUDA device (TRITON_INTERPRET=1: on the CPU).

Imported when an op first runs, so that a machine without Triton can import everything else.
"""
