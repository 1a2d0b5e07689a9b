"""Data parallelism: the gradients of two processes, and of replicas, equal those of one."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from spikingjelly.activation_based import functional, layer, surrogate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sj_taid import ALIFNode, fresh_state
from tests.helpers import TOLERANCE

WORLD = 2


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(6, 5),
        ALIFNode(channels=5, v_threshold=0.3, surrogate_function=surrogate.ATan()),
        layer.Linear(5, 3),
        ALIFNode(v_threshold=0.2, surrogate_function=surrogate.ATan()),
    )
    functional.set_step_mode(net, "m")
    return net


def batches():
    """Two training steps of ``[T, N, 6]``."""
    return torch.rand(2, 4, 8, 6, generator=torch.Generator().manual_seed(1))


def train(net, module, steps):
    """The gradients of each step."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    history = []
    for x_seq in steps:
        with fresh_state(net):
            optimizer.zero_grad()
            module(x_seq).square().mean().backward()
            history.append({name: p.grad.clone() for name, p in net.named_parameters()})
            optimizer.step()
    return history


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD
    )
    net = make_net()
    # On rank 1 the parameters start elsewhere: DDP must broadcast w and V_th too.
    if rank == 1:
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.5)
    module = DistributedDataParallel(net)
    half = batches().shape[2] // WORLD
    history = train(net, module, batches()[:, :, rank * half : (rank + 1) * half])
    torch.save(history, f"{folder}/{rank}.pt")
    # No rank may leave while the other still talks to it: gloo's threads abort the process.
    dist.barrier()
    del module
    dist.destroy_process_group()


@pytest.mark.slow
def test_ddp_gradients_equal_one_process(tmp_path):
    net = make_net()
    expected = train(net, net, batches())
    mp.start_processes(worker, args=(tmp_path,), nprocs=WORLD, start_method="forkserver")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for step, want in enumerate(expected):
        for name, gradient in want.items():
            assert gradient.abs().max() > 0, name
            assert torch.equal(ranks[0][step][name], ranks[1][step][name]), name
            bound = TOLERANCE[torch.float32]["value"] * max(1.0, gradient.abs().max().item())
            assert (ranks[0][step][name] - gradient).abs().max() <= bound, name


def test_replicas_share_gradients_but_not_states():
    """What DataParallel does on several GPUs, by hand: replicas hold tensors for parameters."""
    node = ALIFNode(channels=6, v_threshold=0.3, step_mode="m")
    x_seq = batches()[0]
    node(x_seq).sum().backward()
    expected = {name: p.grad.clone() for name, p in node.named_parameters()}
    v = node.v
    node.reset()
    node.zero_grad()

    halves = []
    for half in x_seq.chunk(2, dim=1):
        replica = node._replicate_for_data_parallel()
        for name, parameter in node.named_parameters():
            setattr(replica, name, parameter * 1.0)
        replica(half).sum().backward()
        halves.append(replica.v)

    assert node.v == 0.0
    assert torch.equal(torch.cat(halves), v)
    for name, parameter in node.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])
