# SPDX-License-Identifier: Apache-2.0
"""Triton kernels, installed as ``fastvit.kernels``.

Nothing here imports torch at module level, so that the kernels can be compiled ahead of time with
Triton alone. Every file holds a kernel and the function that launches it; ``configs`` says which
serve a call. The file itself must stay: without it an editable install cannot find the package.
"""
