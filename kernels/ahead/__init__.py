# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled ahead of time, for a GPU that need not be there, and what they take of it.

Needs Triton, not torch. ``bench/resources.py`` keeps the tables of it, ``fastvit tune`` discards by
it what would spill and orders the rest.
"""
