"""The drop-in optimizer in two processes: DDP, FSDP2 and distributed checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from learned_opt import LearnedOptimizer
from tests.learned_opt.drop_in import noisy_rule
from tests.learned_opt.rule_cases import DROP_IN

STEPS = 4


def make_model() -> nn.Sequential:
    """Rows that two processes share unevenly, and of which one has none."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))


def loss_of(model: nn.Module, step: int) -> Tensor:
    rng = torch.Generator().manual_seed(step)
    return (model(torch.randn(8, 6, generator=rng)) - torch.randn(8, 1, generator=rng)).square()


def train(model: nn.Module, optimizer: LearnedOptimizer, steps: range) -> None:
    """Each process has its half of the batch."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step)[dist.get_rank() :: 2].mean().backward()
        optimizer.step()


def assert_same(kind: str, found: list[Tensor], expected: list[Tensor]) -> None:
    """But for rounding, which says what eigenvectors are where eigenvalues are near each other."""
    exact = {} if kind not in ("basis", "horizon") else {"rtol": 1e-3, "atol": 3e-4}
    torch.testing.assert_close(found, expected, **exact)


def whole(model: nn.Module) -> list[Tensor]:
    full = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return [p.detach().clone() for p in full]


def test_parameters_that_are_flattened_are_refused() -> None:
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for original in (False, True):
            model = FullyShardedDataParallel(
                make_model(), use_orig_params=original, device_id=torch.device("cpu")
            )
            with pytest.raises(ValueError, match="use FSDP2"):
                LearnedOptimizer(model.parameters())
    finally:
        dist.destroy_process_group()


def reference(kind: str) -> list[Tensor]:
    model = make_model()
    optimizer = LearnedOptimizer(model.parameters(), weights=noisy_rule(kind), weight_decay=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, step).mean().backward()
        optimizer.step()
    return whole(model)


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.children(), model):
        fully_shard(module, mesh=mesh)
    return model


def ddp(kind: str, folder: Path) -> None:
    model = make_model()
    wrapped = DistributedDataParallel(model)
    optimizer = LearnedOptimizer(wrapped.parameters(), weights=noisy_rule(kind), weight_decay=0.1)
    train(wrapped, optimizer, range(STEPS))
    assert_same(kind, whole(model), reference(kind))
    mine = torch.cat([p.flatten() for p in whole(model)])
    theirs = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(theirs, mine)
    assert torch.equal(*theirs)  # ranks do not drift apart


def fsdp(kind: str, folder: Path) -> None:
    model = shard(make_model())
    optimizer = LearnedOptimizer(model.parameters(), weights=noisy_rule(kind), weight_decay=0.1)
    train(model, optimizer, range(STEPS))
    assert_same(kind, whole(model), reference(kind))
    for p in model.parameters():
        entries = [e for e in optimizer.state[p].values() if isinstance(e, DTensor)]
        assert entries and all(e.placements == p.placements for e in entries)
        assert all(e.shape[:-1] == p.shape for e in entries)
    before = whole(model)
    optimizer.zero_grad()
    loss_of(model, STEPS).mean().backward()
    if dist.get_rank() == 0:  # whose shard alone has it: the tensor must rest on both
        model[0].weight.grad.to_local()[0, 0] = float("nan")
    optimizer.step()
    after = whole(model)
    assert [torch.equal(x, y) for x, y in zip(before, after, strict=True)].count(True) == 1
    assert torch.equal(before[0], after[0])
    with pytest.warns(UserWarning):
        assert optimizer.skipped_steps() == 1


def fsdp_of_few_rows(kind: str, folder: Path) -> None:
    """Of one row the second process has nothing, but takes part in the sums. Without FSDP's forward
    each process has the whole gradient."""
    for rows in (1, 3):
        sharded = nn.Linear(5, rows, bias=False)
        start = torch.arange(5.0 * rows).view(rows, 5) + 1
        sharded.weight.data.copy_(start)
        weights = [start.clone().requires_grad_(), shard(sharded).weight]
        for weight in weights:
            optimizer = LearnedOptimizer([weight], weights=noisy_rule(kind))
            for step in range(3):
                optimizer.zero_grad()
                (weight * (step + 1.0)).square().sum().backward()
                optimizer.step()
        torch.testing.assert_close(weights[1].full_tensor(), weights[0])


def checkpoint(kind: str, folder: Path) -> None:
    """Saved sharded, loaded by a fresh optimizer: DCP makes its state by a step with lr 0."""
    saved = shard(make_model())
    optimizer = LearnedOptimizer(saved.parameters(), weights=noisy_rule(kind), weight_decay=0.1)
    train(saved, optimizer, range(2))
    model_state, optimizer_state = get_state_dict(saved, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    torch.manual_seed(5)
    other = shard(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)))
    before = whole(other)
    fresh = LearnedOptimizer(other.parameters(), weights=noisy_rule(kind), weight_decay=0.1)
    model_state, optimizer_state = get_state_dict(other, fresh)
    assert all(map(torch.equal, whole(other), before))
    dcp.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(other, fresh, model_state_dict=model_state, optim_state_dict=optimizer_state)
    train(saved, optimizer, range(2, STEPS))
    train(other, fresh, range(2, STEPS))
    torch.testing.assert_close(whole(other), whole(saved), rtol=0, atol=0)
    assert_same(kind, whole(other), reference(kind))


def worker(rank: int, jobs: list[Callable[[str, Path], None]], folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        for job in jobs:
            for kind in DROP_IN:
                job(kind, folder / f"{job.__name__}-{kind}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_do_as_one_does(tmp_path: Path) -> None:
    mp.spawn(worker, args=([ddp, fsdp, fsdp_of_few_rows, checkpoint], tmp_path), nprocs=2)
