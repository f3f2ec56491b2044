"""Triton kernels, one op per file; imported as babl.kernels and asked for by babl.ops alone.

None is here yet: every operation runs as the plain torch of `babl/ops.py`.
"""
