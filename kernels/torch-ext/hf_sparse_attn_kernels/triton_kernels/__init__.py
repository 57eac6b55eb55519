"""The `triton` implementation (CUDA and ROCm). Importing this folder imports no Triton: its modules do.

Legend, beside that of `selection`: R documents, Hg = H/G, M rows of a program (tokens × heads of a KV group).
"""
