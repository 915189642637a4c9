# SPDX-License-Identifier: Apache-2.0
"""The search behind ``fastvit tune``: which launch configurations are fastest on a GPU.

``problems`` says what is tuned, ``candidates`` what is tried, ``ahead`` compiles it in processes of
its own, ``device`` runs and times it, ``search`` decides and ``report`` tells.
"""
