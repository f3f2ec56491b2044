"""Triton kernels, one op per file; imported as babl.kernels and asked for by babl.ops alone.

Importing a file needs triton; importing this does not. `measured.json` says from which size on, on which GPU, a kernel
is faster than what torch has: `python -m babl.scripts.bench kernels --table` writes it.
"""
