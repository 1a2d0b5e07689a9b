"""The cases that the kernels are tested on: every pair of options, or every combination.

A norm is ``"batch"``, by the input's own statistics, or ``"fixed"``, by the running ones.
"""

import itertools
import math

import torch
from spikingjelly.activation_based import surrogate

from sj_taid._compat import FUNCTIONAL_STATES
from sj_taid.ops import bits
from sj_taid.ops.alif import reference
from sj_taid.ops.alif.norm import Norm
from sj_taid.ops.surrogate import DERIVATIVES
from tests.helpers import Case, results, tensors

#: Name -> one step's shape and the order of its axes in memory. Images: neighbours share a channel.
#: Features and channels-last: neighbours are of different channels. Odd: no 16-byte accesses.
LAYOUTS = {
    "images": ((3, 4, 4, 4), None),
    "features": ((6, 8), None),
    "channels_last": ((2, 8, 3, 2), (0, 1, 3, 4, 2)),
    "transposed": ((4, 8, 6), (0, 3, 2, 1)),
    "odd": ((3, 5, 3), None),
}

#: float32 and float64 may rightly disagree about a spike this near the threshold.
MARGIN = 2e-5

SURROGATES = tuple(
    name
    for name in DERIVATIVES
    if hasattr(surrogate, name)
    # 0.0.0.0.14's own backward of it raises.
    and (FUNCTIONAL_STATES or name != "NonzeroSignLogAbs")
)

OPTIONS = {
    "surrogate": SURROGATES,
    "T": (1, 2, 4, 7, 11, 16, 17, 24, 29),
    "dtype": (torch.float32, torch.float16, torch.bfloat16),
    "layout": tuple(LAYOUTS),
    "v_reset": (0.0, -0.25, None),
    "detach_reset": (False, True),
    "decay_input": (False, True),
    "per_channel": (False, True),
    "v_init": (False, True),
    "through": ("all", "spike_seq", "v", "v_seq"),
    "frozen": ((), ("w",), ("v_threshold",), ("x",), ("w", "v_threshold")),
    "norm": (None, "batch", "fixed"),
    "pack": (False, True),
}


def pairwise(options):
    """Few combinations in which every pair of values of two options occurs (greedy)."""
    names = list(options)
    # A dict for its order.
    pairs = {
        frozenset({(a, x), (b, y)}): None
        for a, b in itertools.combinations(names, 2)
        for x in options[a]
        for y in options[b]
    }
    turns = {name: list(values) for name, values in options.items()}
    while pairs:
        row = dict(next(iter(pairs)))
        for name in names:
            if name not in row:
                row[name] = max(
                    turns[name],
                    key=lambda value: sum(
                        frozenset({(name, value), other}) in pairs for other in row.items()
                    ),
                )
                # Equally good values take turns.
                turns[name].append(turns[name].pop(turns[name].index(row[name])))
        for pair in itertools.combinations(row.items(), 2):
            pairs.pop(frozenset(pair), None)
        yield {name: row[name] for name in names}


def every(options, T):
    """Every combination that compiles to different code at ``T``, some options in turns."""
    turns = ("surrogate", "v_init", "through", "frozen", "norm", "pack")
    cycles = {name: itertools.cycle(options[name]) for name in turns}
    fixed = {name: values for name, values in options.items() if name not in (*turns, "T")}
    for i, values in enumerate(itertools.product(*fixed.values())):
        # Lengths with a common factor would pair the same values every time.
        for name in turns[: 1 + i % len(turns)]:
            next(cycles[name])
        row = dict(zip(fixed, values, strict=True)) | {n: next(c) for n, c in cycles.items()}
        yield {name: row.get(name, T) for name in options}


class Conformance:
    """One combination: what to run, and what the definition says in float64."""

    def __init__(self, row):
        step, self.axes = LAYOUTS[row["layout"]]
        self.case = Case(
            v_reset=row["v_reset"],
            detach_reset=row["detach_reset"],
            decay_input=row["decay_input"],
            channels=step[1] if row["per_channel"] else None,
            dtype=row["dtype"],
            shape=(row["T"], *step),
            surrogate_function=getattr(surrogate, row["surrogate"])(),
            v_init=row["v_init"],
        )
        self.through, self.frozen = row["through"], row["frozen"]
        self.norm, self.pack = row["norm"], row["pack"]
        self.packed = None  # the bits that the latest forward left
        self.name = "-".join(str(value).removeprefix("torch.") for value in row.values())
        #: terms in the sum that is a parameter's gradient
        self.terms = math.prod(self.case.shape) / (self.case.channels or 1)

    def __str__(self):
        return self.name

    def kernels(self, host):
        """The names of the kernels that it launches."""
        return host.collect(
            lambda: self.results(host.cuda.multi_step, self._arranged(self._tensors()))
        )

    def leaves(self):
        """Fresh tensors; neurons that come near their threshold are drawn again."""
        leaves = self._tensors()
        for seed in itertools.count(1):
            near = self._least_distance(leaves) < MARGIN
            if not near.any():
                break
            again = tensors(self.case.with_(seed=seed))
            with torch.no_grad():
                leaves["x"].copy_(torch.where(near, again["x"], leaves["x"]))
        return self._arranged(leaves)

    def results(self, multi_step, leaves):
        """Outputs and gradients by name."""
        all_outputs = ("spike_seq", "v", "v_seq")

        def run(*arguments, **options):
            if self.pack:
                bits.request()
            outputs = multi_step(*arguments, norm=self._norm_of(leaves), **options)
            self.packed = bits.taken()
            return outputs

        return results(
            run,
            self.case,
            leaves,
            store_v_seq=self.through in ("all", "v_seq"),
            through=all_outputs if self.through == "all" else (self.through,),
        )

    def expected(self, leaves):
        """The same by the definition, in float64."""
        return self.results(reference.multi_step, _doubled(leaves))

    def _tensors(self):
        leaves = tensors(self.case)
        if self.norm:
            # Of the kind that batch norms hold: y's spread is x's, and so are the spikes' odds.
            for i, (name, low) in enumerate((("weight", 1.0), ("bias", 0.0))):
                values = torch.linspace(low, low + 0.6, self.case.shape[2]).roll(i)
                leaves[name] = values.requires_grad_()
        return leaves

    def _norm_of(self, leaves):
        if not self.norm:
            return None
        weight, bias = leaves["weight"], leaves["bias"]
        mean = torch.linspace(-0.3, 0.9, len(weight)).to(weight)
        return Norm(weight, bias, mean, (1 + mean).square(), self.norm == "batch", 0.1, 1e-5)

    def _arranged(self, leaves):
        if self.axes is not None:
            leaves["x"] = _in_memory_order(leaves["x"], self.axes)
        for name in self.frozen:
            leaves[name].requires_grad_(False)
        return leaves

    def _least_distance(self, leaves):
        """``|H - V_th|`` at each neuron's step nearest to its threshold."""
        distances = []

        def fire(x):
            distances.append(x.detach().abs())
            return surrogate.heaviside(x)

        case = self.case.with_(surrogate_function=fire)
        doubled = _doubled(leaves)
        v = doubled["v0"] if case.v_init else case.v_reset or 0.0
        with torch.no_grad():
            reference.multi_step(
                doubled["x"],
                v,
                doubled["w"],
                doubled["v_threshold"],
                store_v_seq=False,
                norm=self._norm_of(doubled),
                **case.options(),
            )
        return torch.stack(distances).amin(0)


def _doubled(leaves):
    return {n: t.detach().double().requires_grad_(t.requires_grad) for n, t in leaves.items()}


def _in_memory_order(x, axes):
    inverse = sorted(range(len(axes)), key=axes.__getitem__)
    return x.detach().permute(axes).contiguous().permute(inverse).requires_grad_()
