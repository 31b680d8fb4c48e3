"""The Triton kernels of the cuda backend. Importing a module of this package needs triton; nothing else does."""
