# SPDX-License-Identifier: Apache-2.0
"""Pictures of measurements, from plain data, as SVG: light and dark, the same bytes every time.

=============  ==========================================================================
``epoch``      minutes per ImageNet epoch, library, fastvit and the papers
``ratios``     ConViT ÷ DeiT and ViT_C ÷ ViT_P as bars: papers, published tables, ours
``roofline``   FLOP/s reached over arithmetic intensity, under the measured ceilings
``scaling``    time of an image against tokens, batch and resolution
``theme``      colours, heads, and how a picture becomes text or files
``labels``     places for labels that cover neither each other nor a point
=============  ==========================================================================

Nothing here imports torch, and matplotlib only where something is drawn, so that a program that
must not fail can ask for a picture and get a sentence.
"""
