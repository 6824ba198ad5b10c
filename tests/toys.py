"A method that asks the engine for everything: views of two sizes, a teacher copy that follows, a queue, a layer frozen for a time; and tiles of noise."
from copy import deepcopy
from functools import partial

import numpy as np, torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from sdmae.data.records import Record, Source
from sdmae.data.store import prepare
from sdmae.params import OptimParams, ViewParams
from sdmae.views.augment import Views
from sdmae.views.draws import rank_and_world


def gathered(rows):
    "The rows of all processes, in the order that one process would have them."
    world = rank_and_world()[1]
    if world == 1: return rows
    parts = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(parts, rows)
    return torch.cat(parts)


class Follower(nn.Module):
    optim, frozen_for = OptimParams(base_lr=.05, weight_decay=.05, warmup=0.), .25
    def __init__(self):
        super().__init__()
        self.student = nn.Sequential(nn.Conv2d(3, 8, 5, stride=4), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.last, self.teacher = nn.Linear(8, 4), deepcopy(self.student).requires_grad_(False)
        self.register_buffer("queue", torch.eye(4).repeat(6, 1)) # 24 answers
        self.large, self.small, self.pending = Views(ViewParams(), 32), Views(ViewParams(scale=(.1, .4)), 16), []

    def forward(self, images):
        views = [self.large(images), self.small(images), self.small(images)]
        with torch.no_grad(): answer = F.softmax(self.last(self.teacher(views[0]))/.1, -1)
        if self.training: self.pending.append(answer)
        said = [F.log_softmax(self.last(self.student(x)), -1) for x in views]
        agree, apart = -sum((answer*s).sum(-1).mean() for s in said), (said[0].exp() @ self.queue.T).mean()
        return dict(loss=agree + apart, agree=agree, apart=apart)

    def before_step(self, progress):
        if progress < self.frozen_for:
            for p in self.last.parameters(): p.grad = None

    @torch.no_grad()
    def after_step(self, progress):
        for t, s in zip(self.teacher.parameters(), self.student.parameters()): t.lerp_(s, .1*(1 - progress))
        new = torch.cat([gathered(rows) for rows in self.pending])
        self.queue.copy_(torch.cat([self.queue, new])[len(new):])
        self.pending = []


def noise_tiles(folder, data, splits=("train", "train", "valid", "test"), label=lambda i: "ab"[i//4%2]):
    "Forty tiles of noise, half of them to train on, prepared as `data` says."
    noise = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)
    records = [Record(f"{i}.png", label(i), splits[i%4], "", "", partial(np.copy, noise[i])) for i in range(40)]
    prepare(Source("noise", records, ["a", "b"], False, []), folder, data)
    return folder
