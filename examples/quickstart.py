# SPDX-License-Identifier: Apache-2.0
"""The README's example: a checkpoint of timm's ConViT in fastvit's, on a photograph."""

import timm
import torch
from skimage import data, transform

import fastvit

photo = torch.from_numpy(transform.resize(data.astronaut(), (224, 224))).permute(2, 0, 1)
images = photo[None].float()
theirs = timm.create_model("convit_tiny").eval()  # or with a checkpoint of yours
ours = fastvit.create_model("convit_tiny").eval()
fastvit.models.load_checkpoint(ours, theirs.state_dict())
with torch.inference_mode():
    print((ours(images) - theirs(images)).abs().max())  # rounding only
for name, layer in fastvit.attention_maps(ours, images).items():
    print(name, layer.distance)  # how far each head looks, in patches
