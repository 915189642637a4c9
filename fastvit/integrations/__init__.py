# SPDX-License-Identifier: Apache-2.0
"""Adapters that put the fused ops behind the layers of other libraries, see
:func:`fastvit.accelerate`.

An adapter is a class between a library's class and a module of it: its ``forward`` runs the fused
op where that gives what the library's own would, and that one everywhere else. The libraries are
known by the qualified names of their classes; none is imported.
"""
