"""Random nets are, accelerated, what they were: the property that the feature keeps."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch import nn

import sj_taid
from sj_taid._internal.compat import FUNCTIONAL_STATES
from tests.nets.alike import EVALUATION, accelerated, assert_alike, is_fragile, results
from tests.nets.invariant import asked_after_each_function
from tests.nets.random_nets import FORMS, SHAPE, WAYS, C, Net, Step, W, pick

# ---- hooks, and what else is done to an accelerated net ----

HOOKS = {
    "sees": lambda m, seen: m.register_forward_hook(
        lambda _, args, y: seen().append(y.detach().clone())
    ),
    "changes": lambda m, seen: m.register_forward_hook(lambda _, args, y: 1.1 * y),
    "changes inputs": lambda m, seen: m.register_forward_pre_hook(lambda _, args: (0.9 * args[0],)),
    "sees gradients": lambda m, seen: m.register_full_backward_hook(
        lambda _, grads, into: seen().append(into[0].clone())
    ),
}


def add_hook(net, rng):
    """A hook on a norm, neuron or layer."""
    paths = [p for p, m in net.named_modules() if p.endswith(("norm", "neuron", "layer"))]
    if paths:
        path, kind = pick(rng, paths), pick(rng, HOOKS)
        HOOKS[kind](net.get_submodule(path), lambda: net.seen)


def replica(net):
    """As ``DataParallel`` copies a net to another device, with weights of its own."""
    copies = {}
    for module in net.modules():
        copies[module] = made = module._replicate_for_data_parallel()
        for name, p in module._parameters.items():
            setattr(made, name, None if p is None else p + 0.25 * p.detach())
        for name, buffer in module._buffers.items():
            setattr(made, name, None if buffer is None else buffer.clone())
    for module, made in copies.items():
        for name, child in module._modules.items():
            made._modules[name] = copies[child]
    return copies[net]


def fail_once(net, x):
    net.fails = True
    with pytest.raises(KeyError):
        net(x)
    net.fails = False
    functional.reset_net(net)
    for step in net.modules():
        step.more = []
    return net


def load_after_training(net, x):
    state = copy.deepcopy(net.state_dict())
    results(net, x)
    net.load_state_dict(state)
    return net


#: what is done to both nets; ``speed`` accelerates one of them
TREATMENTS = {
    "alone": lambda speed, net, x: speed(net),
    "measured": lambda speed, net, x: speed(net, x),
    "copied": lambda speed, net, x: copy.deepcopy(speed(net)),
    "pickled": lambda speed, net, x: pickle.loads(pickle.dumps(speed(net))),
    "loaded": lambda speed, net, x: load_after_training(speed(net), x),
    "twice": lambda speed, net, x: speed(speed(net)),
    "evaluated": lambda speed, net, x: speed(net).eval(),
    "fails once": lambda speed, net, x: fail_once(speed(net), x),
}


def prepare(net, seed, x, speed=lambda net, x=None: net):
    """A copy of the net with what this seed does to it, and how it is run."""
    rng, net = np.random.default_rng(seed), copy.deepcopy(net)
    name, hooked, first = pick(rng, TREATMENTS), rng.random() < 0.4, rng.random() < 0.5
    options = {
        "between": functional.reset_net if rng.random() < 0.7 else functional.detach_net,
        "context": torch.no_grad if rng.random() < 0.1 else torch.enable_grad,
    }
    if hooked and first:
        add_hook(net, rng)
        name = "alone"  # a hook's list is that of the net it was put on
    if name == "evaluated" and options["context"] is torch.enable_grad:
        options["context"] = EVALUATION
    net = TREATMENTS[name](speed, net, x)
    if hooked and not first:
        add_hook(net, rng)
    if not hooked and rng.random() < 0.1:
        return net, options | {"run": replica}
    return net, options


def check(seed, asks=False):
    """The net of a seed; ``asks``: whether the invariant is checked after each function."""
    for attempt in range(30):
        net = Net(1000 * seed + attempt)
        if not any(isinstance(module, neuron.BaseNode) for module in net.modules()):
            continue
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) + 0.2
        try:
            plain, options = prepare(net, seed, x)
            expected = results(plain, x, **options)
        except (RuntimeError, NotImplementedError):  # such as a change that autograd forbids
            continue
        plain, options = prepare(net, seed, x)
        if is_fragile(plain, x, **options):
            continue
        exact, options = prepare(net.double(), seed, x.double())
        exact = results(exact, x.double(), **options)
        fast, options = prepare(net.float(), seed, x, accelerated)
        with asked_after_each_function() if asks else nullcontext():
            found = results(fast, x, **options)
        assert_alike(found, expected, exact)
        return
    raise AssertionError("no net whose spikes survive rounding")


# ---- every way from a norm to a neuron ----

#: every way of each layout, of other norms one
EVERY_WAY = [(form, way) for form in FORMS for way in WAYS[FORMS[form][3]]]
LIKE_OTHERS = ("own tdbn", "bare", "tdbn", "container")
EVERY_WAY = [e for e in EVERY_WAY if e[0] not in LIKE_OTHERS or e[1] in ("view", "as it is")]
if not FUNCTIONAL_STATES:  # 0.0.0.0.14's tdBN raises an error
    EVERY_WAY = [(form, way) for form, way in EVERY_WAY if form != "tdbn"]
#: what is no view of the norm's input with time outermost, so that the norm is computed apart
APART = {"scrambled", "stacked", "backwards", "batch for time", "first axes swapped", "windows"}


def draw_way(form, way):
    step = Step(np.random.default_rng(0))
    make, norm, _, step.layout = FORMS[form]
    step.form, step.way, step.before, step.after, step.has_norm = form, way, None, None, True
    step.layer, step.norm = make(), norm(C)
    step.neuron = neuron.LIFNode(v_threshold=0.5, surrogate_function=surrogate.ATan())
    functional.set_step_mode(nn.Sequential(step.norm, step.neuron), "m")
    return step


@pytest.mark.parametrize(("form", "way"), EVERY_WAY)
def test_way_is_fused(form, way):
    step, x = draw_way(form, way), torch.randn(SHAPE, requires_grad=True)
    # A plain neuron's spikes are contiguous, so that any view of them works.
    step.neuron.register_forward_hook(lambda module, args, y: y.view(len(y), -1).view(y.shape))
    report = sj_taid.accelerate(step, x)
    # In a linear layer's memory the scrambled tokens are a view.
    fused = way not in APART or (form, way) == ("linear", "scrambled")
    assert f"{int(fused)} of 1 norms fused" in str(report)


@pytest.mark.parametrize(("form", "way"), dict(EVERY_WAY).items())
def test_way_under_autocast(form, way):
    """In half precision nets part, but the accelerated one is as near to the exact one."""
    step, g = draw_way(form, way), torch.Generator().manual_seed(1)
    x = torch.randn(SHAPE, generator=g)
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    fast = accelerated(copy.deepcopy(step))
    exact = results(copy.deepcopy(step).double(), x.double())
    plain, got = (results(net, x, context=context) for net in (step, fast))
    for name, best in exact.items():
        assert got[name].dtype == plain[name].dtype or name.endswith(".v"), name
        errors = [float((t[name].double() - best.double()).norm()) for t in (got, plain)]
        assert errors[0] <= 2 * errors[1] + 0.1 * float(best.double().norm()) + 1e-3, (name, errors)


def test_accelerated_nets_in_threads():
    """Steps and ``accelerate`` at once, and a net that has nothing to do with it."""

    def run(seed):
        plain = nn.Sequential(nn.Linear(W, 5), nn.ReLU())
        step = draw_way(*EVERY_WAY[seed])
        x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
        expected = plain(x), step(x)
        functional.reset_net(step)
        step = accelerated(step)
        for _ in range(5):
            assert torch.equal(plain(x), expected[0])
            got = step(x)
            got.sum().backward()
            assert (got != expected[1]).float().mean() < 1e-3
            functional.reset_net(step)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [0, 1, 9, 15, 22, 28] * 2))


def ddp_input(rank):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(rank))


def ddp_worker(rank, folder, net):
    torch.set_num_threads(1)
    path, wrap = f"file://{folder}/rendezvous", nn.parallel.DistributedDataParallel
    torch.distributed.init_process_group("gloo", init_method=path, rank=rank, world_size=2)
    nets = copy.deepcopy(net), accelerated(copy.deepcopy(net)), copy.deepcopy(net).double()
    expected, got, exact = (
        results(n, ddp_input(rank).to(n[0].norm.weight.dtype), run=wrap) for n in nets
    )
    assert_alike(got, expected, exact)
    wrapped = wrap(net)
    sj_taid.unaccelerate(accelerated(wrapped))
    assert not any("sj_taid" in str(type(module)) for module in net.modules())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_accelerated_nets_in_two_processes(tmp_path):
    nets = (nn.Sequential(draw_way(*EVERY_WAY[i]), draw_way(*EVERY_WAY[i + 11])) for i in range(18))
    net = next(n for n in nets if not any(is_fragile(n, ddp_input(rank)) for rank in range(2)))
    torch.multiprocessing.start_processes(
        ddp_worker, args=(tmp_path, net), nprocs=2, start_method="forkserver"
    )


@pytest.mark.parametrize("seed", range(24))
def test_random_net(seed):
    check(seed, asks=seed % 2 > 0)


@pytest.mark.fuzz
@pytest.mark.parametrize("seeds", [range(i, i + 100) for i in range(100, 2100, 100)])
def test_random_nets(seeds):
    for seed in seeds:
        check(seed, asks=seed % 2 > 0)
