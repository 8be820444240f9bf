"""What notebook 04 measures of a model that learns: routers and a dense layer, from some seeds each; and pairs of runs
that differ in nothing but chance."""

import functools

import torch

from omni_kernels import factored_router, omni_router
from omni_kernels.original import original_backward
from omni_kernels.reference import backward_router

from . import byte_model, tables
from .rivals import Case
from .routing import routed
from .training import ATOMICS, OURS, REPEATED, SCATTER, record_sample, record_training, sequential_sums

OMNI, DENSE = "omni_router", "dense layer"
ROUTERS = {
    OMNI: omni_router,
    "PyTorch, slot by slot": routed(factored_router, sequential_sums),
    "PyTorch, scatter_add": routed(factored_router, backward_router),
}
TRAINED, WIDTH = Case(4096, 64, 16, "fp32"), 128  # tokens of a batch; width of the model
SEEDS, NUM_STEPS = range(3), 300

# The routers of a pair have one forward. Sizes, each with the width of its model: many slots share a row, or few do.
PAIRS = {
    SCATTER: routed(omni_router, backward_router), ATOMICS: routed(omni_router, original_backward), OURS: omni_router,
}  # fmt: skip
PAIRED = {REPEATED: 32, TRAINED: WIDTH}
PAIR_STEPS = 100


def omni_layer(case, route):
    """What makes the layer of a case's size."""
    return functools.partial(byte_model.OmniLayer, num_expert_sqrt=case.num_expert_sqrt, k=case.k, route=route)


def dense_layer(case):
    """What makes the dense layer that costs as much."""
    return functools.partial(byte_model.DenseLayer, hidden=case.num_expert_sqrt + case.k)


# --- routers and a dense layer ---


def measure_training(binary, case=TRAINED, device="cuda", width=WIDTH, num_steps=NUM_STEPS, letters=500):
    """Tables training, training_runs and training_sample."""
    layers = {name: omni_layer(case, route) for name, route in ROUTERS.items()} | {DENSE: dense_layer(case)}
    runs, text = {seed: {} for seed in SEEDS}, None
    for seed, found in runs.items():
        for name, layer in layers.items():
            model, found[name] = byte_model.train(layer, num_steps, case.num_tokens, device, width, seed)
            text = text or byte_model.write(model, "The following is ", letters)
            del model  # before the next, which would count its memory
    for found in runs.values():
        record_training(binary, found, **case._asdict())
    record_sample(binary, text)


def launch_training():
    """Launches what `measure_training` measures."""
    byte_model.train(omni_layer(TRAINED, omni_router), 1, TRAINED.num_tokens, "cuda", WIDTH)


# --- pairs of runs ---


def first_difference(one, other):
    """Of two runs' experts, (num_tokens, k): how many tokens chose otherwise; and the first of them, with the best
    expert that only the one run chose and the best that only the other did, or nothing."""
    tokens = (one.sort(1).values != other.sort(1).values).any(1).nonzero().flatten().tolist()
    if not tokens:
        return 0, {}
    ours, others = one[tokens[0]].tolist(), other[tokens[0]].tolist()
    expert = next(expert for expert in ours if expert not in others)
    instead = next(expert for expert in others if expert not in ours)
    return len(tokens), {"token": tokens[0], "expert": expert, "instead": instead}


def largest_difference(model, other):
    """Of the weights of two models."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return torch.stack([(a.detach() - b.detach()).abs().max() for a, b in pairs]).max().item()


def compare_runs(one, other):
    """Two runs of `byte_model.steps`, side by side.

    Returns:
        Rows, one a step: how many choices, one a token and layer, differ, of how many; and by how much losses and
        weights do, those after the step. And the first choice that differs, as first_difference says, or nothing.
    """
    rows, first = [], {}
    for step, (ours, others) in enumerate(zip(one, other, strict=True), start=1):
        (model, loss, _), (other_model, other_loss, _) = ours, others
        choices = made = 0
        for number, layers in enumerate(zip(model.omni, other_model.omni, strict=True), start=1):
            count, found = first_difference(*(layer.chosen for layer in layers))
            choices += count
            made += len(layers[0].chosen)
            if found and not first:
                first = {"step": step, "layer": number, **found}
        rows.append({"step": step, "choices": choices, "made": made, "loss_difference": abs(loss - other_loss),
                     "weight_difference": largest_difference(model, other_model)})  # fmt: skip
    return rows, first


def measure_pairs(binary, cases=PAIRED, device="cuda", num_steps=PAIR_STEPS):
    """Table pairs: a row a step. Table pairs_runs: a row a pair, with the first choice that differs."""
    curves, summary = [], []
    for case, width in cases.items():
        for name, route in PAIRS.items():
            layer = omni_layer(case, route)
            pair = (byte_model.steps(layer, num_steps, case.num_tokens, device, width) for _ in range(2))
            rows, first = compare_runs(*pair)
            of = {"rival": name, **case._asdict()}
            curves += [{**of, **row} for row in rows]
            apart = next((row["step"] for row in rows if row["weight_difference"]), None)
            unknown = dict.fromkeys(["step", "layer", "token", "expert", "instead"])
            summary.append({**of, "steps": num_steps, "apart": apart, **rows[-1], **unknown, **first})
    tables.append("pairs", curves, binary=binary)
    tables.append("pairs_runs", summary, binary=binary)


def launch_pairs():
    """Launches what `measure_pairs` measures."""
    for case, width in PAIRED.items():
        for route in PAIRS.values():
            list(byte_model.steps(omni_layer(case, route), 1, case.num_tokens, "cuda", width))
