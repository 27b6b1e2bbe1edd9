"""The arithmetic of a step on an NVIDIA card, in Triton. Knows rows, slots and blocks; imported only where it runs.

The same kernels run on the CPU in Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested without a
card.
"""
