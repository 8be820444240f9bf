"""Every picture that needs no GPU, by its name: those of recorded tables, and those that show what code does.

Notebooks draw the same ones, from what they have at hand. `python notebooks/study --draw` draws them all.
"""

import concurrent.futures
import functools
import multiprocessing
import os

import matplotlib.pyplot as plt
import torch

from omni_kernels import brute_force_router
from omni_kernels.reference import backward_router

from . import (
    autotune_pictures,
    autotune_report,
    calls_report,
    ladder_pictures,
    layer_report,
    many_gpus_report,
    profiling_report,
    reports,
    routing,
    routing_pictures,
    speed_report,
    traffic,
    traffic_pictures,
    training_report,
    tuner,
)
from .configurations import Problem
from .pictures import write_figure
from .rivals import CASE

WORKERS = 4  # processes that draw
SLOW = ["stale_gradients", "autotune_transfer"]  # drawn first, so that none of them is left at the end

# --- notebook 1: a token of real text ---

N, K, TOKEN = 16, 8, 5


def _token():
    """One token: its letter and its logits."""
    tokens = routing.text_bytes(512)
    x, y = routing.text_logits(tokens, N)
    return chr(tokens[TOKEN]), x[TOKEN], y[TOKEN]


def score_grid():
    letter, x, y = _token()
    return routing_pictures.draw_score_grid(x, y, K, letter)


def staircase():
    _, x, y = _token()
    return routing_pictures.draw_staircase(x, y, 16)


def ties():
    x, y = torch.randint(0, 3, (2, 4, 8), generator=torch.Generator().manual_seed(1)).float()[:, 0]
    return routing_pictures.draw_ties(x, y, 12)


def gradient():
    _, x, y = _token()
    scores, experts = brute_force_router(x[None], y[None], K)
    rows, columns = experts[0].long() // N, experts[0].long() % N
    return routing_pictures.draw_gradient(rows, columns, scores[0].softmax(0), N)


def stale_gradients():
    ways = {"zeroed": backward_router, "never zeroed": routing.NeverZeroed()}
    return routing_pictures.draw_losses({name: routing.train_next_byte(way) for name, way in ways.items()})


# --- notebook 2: configurations ---

MAPPED = [Problem(kernel, 1024, n, 16) for kernel, n in (("fwd", 64), ("fwd_split", 256), ("bwd", 256))]


@functools.cache
def _configurations():
    return autotune_report.recorded_rows("autotune")


def _tuned(draw, *args):
    """A picture of the recorded GPU, or nothing."""
    rows = autotune_report.of_gpu(_configurations())
    return draw(rows, *args) if len(rows) else None


def _elsewhere(draw):
    """A picture of another GPU, the last that was recorded, beside the recorded one."""
    rows = _configurations()
    others = [gpu for gpu in rows["gpu"].unique() if gpu != autotune_report.RECORDED_GPU] if len(rows) else []
    return draw(autotune_report.of_gpu(rows, others[-1]), autotune_report.of_gpu(rows)) if others else None


# --- all notebooks ---

LAYER = traffic.Layer(num_expert_sqrt=16384, k=16, hidden=1024, num_tokens=16384)


def _trained(draw, table, *keys):
    rows = training_report.recorded(table, *keys)
    return draw(rows) if len(rows) else None


PICTURES = {
    **{draw.__name__: draw for draw in (score_grid, staircase, ties, gradient, stale_gradients)},
    **{
        f"autotune_{name}": functools.partial(_tuned, autotune_pictures.draw_heat_map, problem)
        for name, problem in zip(("forward", "split", "backward"), MAPPED, strict=True)
    },
    "autotune_distribution": lambda: _tuned(autotune_pictures.draw_distribution),
    "autotune_regret": lambda: _tuned(autotune_pictures.draw_regret, MAPPED),
    "autotune_gains": lambda: _tuned(autotune_pictures.draw_gains),
    "autotune_prediction": lambda: _tuned(autotune_pictures.draw_correlations),
    "autotune_transfer": lambda: _tuned(autotune_pictures.draw_transfer),
    "autotune_tuner": lambda: _trained(autotune_pictures.draw_tuner, "tuner", *tuner.KEYS),
    "autotune_here": lambda: _elsewhere(lambda here, _: autotune_pictures.draw_distribution(here)),
    "autotune_two_gpus": lambda: _elsewhere(autotune_pictures.draw_two_gpus),
    "ladder": lambda: reports.drawn(speed_report.draw_ladder, "ladder"),
    "ladder_owners": ladder_pictures.draw_owners,
    "network_sort": lambda: ladder_pictures.draw_network("sort", 16),
    "network_merge": lambda: ladder_pictures.draw_network("merge best", 32, 16),
    "speed_tokens": lambda: reports.drawn(speed_report.draw_tokens, "against_tokens"),
    "speed_size": lambda: reports.drawn(speed_report.draw_size, "against_size"),
    "speed_k": lambda: reports.drawn(speed_report.draw_k, "against_k"),
    "speed_roofline": lambda: reports.drawn(speed_report.draw_roofline, "targets", "against_tokens", "against_k"),
    "speed_guide": lambda: reports.drawn(speed_report.draw_guide, "guide"),
    "speed_memory": lambda: reports.drawn(speed_report.draw_memory, "memory"),
    "calls": lambda: reports.drawn(calls_report.draw_calls, "calls"),
    "gradient_repeats": lambda: _trained(training_report.draw_repeats, "repeats_map", "rival", "token", "column"),
    "backward_speed": lambda: _trained(training_report.draw_backward, "backward", "rival", *CASE),
    "routing_precision": lambda: _trained(training_report.draw_precision, "precision", "rival", *CASE),
    "training": lambda: _trained(training_report.draw_training, "training", "rival", "seed", "step"),
    "pairs": lambda: _trained(training_report.draw_pairs, "pairs", "rival", *CASE, "step"),
    "layer": lambda: reports.drawn(layer_report.draw_layer, "layer"),
    "layer_training": lambda: _trained(training_report.draw_training, "layer_training", "rival", "seed", "step"),
    "layer_adaptive": lambda: _trained(layer_report.draw_adaptive, "layer_adaptive", "rival", "value"),
    "layer_text": lambda: _trained(layer_report.draw_text, "layer_text", "layer", "position"),
    "shardings": lambda: traffic_pictures.draw_shardings(LAYER),
    "exchange_break_even": lambda: traffic_pictures.draw_break_even(
        4096, 16, [2**power for power in range(1, 11)], (8, 16, 32, 64)
    ),
    "many_gpus": lambda: reports.drawn(many_gpus_report.draw_targets, "many_gpus"),
    "many_gpus_link": lambda: reports.drawn(many_gpus_report.draw_link, "many_gpus"),
    "profile_busy": lambda: reports.drawn(profiling_report.draw_busy, "profile"),
    "profile_instructions": lambda: reports.drawn(profiling_report.draw_instructions, "profile"),
    "profile_waits": lambda: reports.drawn(profiling_report.draw_waits, "profile"),
    "many_gpus_paper": lambda: traffic_pictures.draw_paper(LAYER, [2**power for power in range(1, 13)]),
}


def _keep(name):
    figure = PICTURES[name]()
    if figure:
        write_figure(figure, name)
        plt.close(figure)


def draw_all():
    """Draws every picture and keeps it by its name, but those whose tables nobody has recorded; in processes, as one
    picture takes a second."""
    workers = min(WORKERS, len(os.sched_getaffinity(0)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
        for _ in pool.map(_keep, SLOW + [name for name in PICTURES if name not in SLOW]):
            pass
