# SPDX-License-Identifier: Apache-2.0
"""The version, in the one place from which the build, the package and its metadata read it."""

__version__ = "0.1.0"
