# SPDX-License-Identifier: Apache-2.0
"""What a GPU has to say about fastvit, in one command: ``make gpu``."""
