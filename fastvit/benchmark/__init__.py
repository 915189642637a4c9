# SPDX-License-Identifier: Apache-2.0
"""The papers' tables, measured.

Every row of ``models.json`` is built twice: as the library model that a user has today
(timm or torchvision, eager, fused attention on) and as the fastvit model, with the same weights.
The two must agree by the numbers rule of :mod:`fastvit.testing` before either is timed.
``pytest bench/ --benchmark`` and ``fastvit bench`` run it; the modules here hold what those runs
and the tests share:

=========================  ==========================================================
``rows``                   the rows of ``models.json`` as dataclasses, and their selection
``library``, ``weights``   the two models of a row and their common random weights
``counter``                flops, parameters and activations by the papers' rule
``agreement``              the gate before timing
``steps``, ``measure``     timed steps; one row from construction to figures
``result``                 what one row yields, minutes per epoch
``table``, ``text``        the printed tables and the lines above and below them
``report``, ``plot``       ``epoch.json``, ``epoch.md``, ``epoch.svg``
``pictures``               pictures from plain data, of ``make gpu`` too
``files``                  files that are whole or not there
``machine``                what the figures were measured on
``contests``, ``modules``  layers and models against their peers; measured and printed
``options``, ``session``   what can be asked of a run, and the run
``command``, ``drive``     ``fastvit bench``
``figures``, ``stated``    figures with an identity; what a file states follows from its samples
``reading*``               files of results as figures
``compar*``                what changed between two runs beyond the measured spread
=========================  ==========================================================

timm, torchvision and matplotlib (the ``bench`` extra) are imported by the functions that need
them.
"""
