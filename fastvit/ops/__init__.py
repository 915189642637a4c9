# SPDX-License-Identifier: Apache-2.0
"""The private ops behind :mod:`fastvit.functional`, and the choice of their backend."""
