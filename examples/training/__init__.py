# SPDX-License-Identifier: Apache-2.0
"""Training on one processor or many GPUs, that a kill cannot spoil: the parts of ``train.py``.

Read in this order: ``config`` (what can be set), ``data``, ``augment``, ``optim``, ``parallel``,
``checkpoint``, ``loop``. Everything random is drawn from a seed made of the run's seed and of where
the draw happens (:func:`seeds.derive`), so no state of a generator has to be kept.
"""
