# SPDX-License-Identifier: Apache-2.0
"""From committed results to the figures in documents and pictures: see ``bench/performance.py``.

==============  =========================================================================
``pairs``       ours and the strongest other way, from the records of ``make gpu``
``models``      whole models in the same: ratios, times by batch and resolution
``gpu``         pictures of a run of ``make gpu``
``sources``     result sets on disk, their head lines, and whether they are stale
``load``        results from JSON; what their samples do not give is refused
``processor``   blocks from ``modules.json`` and ``epoch.json``
``graphics``    blocks from a committed run of ``make gpu``
``cited``       what others published
``predicted``   a block of the compiler's and the model's words
``drawn``       the pictures in ``docs/pictures``
``documents``   blocks in documents: found, filled, compared
==============  =========================================================================

The first three and ``cited`` import neither torch nor anything that has to be built: the driver of
``make gpu``, which outlives all that fails, uses them.
"""
