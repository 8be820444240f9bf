"""Layers from PyPI that select experts by product keys compute the same when omni_router selects them."""

import itertools

import pytest
import torch
from torch import einsum

from omni_kernels import omni_router

PEER = pytest.importorskip("PEER_pytorch").PEER
PKM = pytest.importorskip("product_key_memory").PKM

DIM = 8  # small, as a layer has N² vectors of it
EPS = torch.finfo(torch.float32).eps


def route(x, y, k):
    """Every head of a token routes as a token of its own. x, y: (batch, tokens, heads, N). Returns scores and experts,
    (batch, tokens, heads, k)."""
    scores, experts = omni_router(x.flatten(0, -2), y.flatten(0, -2), k)
    shape = *x.shape[:-1], k
    return scores.view(shape), experts.view(shape)


class OmniPEER(PEER):
    """PEER, without its dropout, its mask and experts that belong to a head."""

    def forward(self, tokens):
        tokens = self.norm(tokens)
        logits_x, logits_y = einsum("pbthd,hnpd->pbthn", self.to_queries(tokens), self.keys)
        scores, experts = route(logits_x, logits_y, self.num_experts_per_head_topk)
        hidden = self.activation(einsum("btd,bthkd->bthk", tokens, self.weight_down_embed(experts)))
        return einsum("bthk,bthkd->btd", hidden * self.score_activation(scores), self.weight_up_embed(experts))


class OmniPKM(PKM):
    """PKM, without its dropouts, its masks, its noise, and the norms before and after it."""

    def forward(self, tokens):
        queries = self.to_queries(tokens).unflatten(-1, (2, self.heads, -1))
        queries = self.norm(queries.permute(0, 2, 3, 1, 4))
        logits_x, logits_y = einsum("bphtd,hnpd->bthpn", queries, self.keys).unbind(-2)
        scores, memories = route(logits_x, logits_y, self.topk)
        weights = self.gate_activation(scores).flatten(0, 1).flatten(1)
        return self.values(memories.flatten(0, 1).flatten(1), per_sample_weights=weights).view_as(tokens)


def peer_options(num_expert_sqrt, k, heads, softmax):
    """Without softmax PEER selects one expert only, the best of its k × k candidates."""
    experts = {"num_experts": num_expert_sqrt**2, "num_experts_per_head": k}
    return {"heads": heads, **experts, "non_competing_scores": not softmax}


def pkm_options(num_expert_sqrt, k, heads, softmax):
    memories = {"num_keys": num_expert_sqrt, "topk": k, "dim_head": DIM}
    return {"heads": heads, **memories, "non_competitive_gates": not softmax}


def gate(layer):
    """The module that the scores of the selected experts go through."""
    return layer.score_activation if isinstance(layer, PEER) else layer.gate_activation


def tokens_without_ties(layer):
    """Tokens without two equal scores, which the layer may put in either order."""
    found = []
    hook = gate(layer).register_forward_pre_hook(lambda _, inputs: found.extend(inputs))
    for seed in itertools.count():
        tokens = torch.randn(1, 2, DIM, generator=torch.Generator().manual_seed(seed)).to(layer.keys.device)
        layer(tokens)
        if found.pop().diff().all():
            hook.remove()
            return tokens


def results(layer, tokens):
    """The output; the gradients of the tokens and of all parameters, by name; and the same once more with the gradients
    of the scores rounded to multiples of 2⁻¹², which fp32 adds exactly as long as the sums stay below 2¹²."""
    rounding = []

    def round_gradients(_, grad_inputs, __):
        return tuple((grad * 2**12).round() / 2**12 for grad in grad_inputs) if rounding else None

    gate(layer).register_full_backward_hook(round_gradients)
    leaves = {"tokens": tokens.clone().requires_grad_(), **dict(layer.named_parameters())}
    output = layer(leaves["tokens"])
    grad_output = torch.linspace(-2, 2, output.numel(), device=output.device).view_as(output)
    grads = torch.autograd.grad(output, leaves.values(), grad_output, retain_graph=True)
    rounding.append(True)
    rounded = torch.autograd.grad(output, leaves.values(), grad_output)
    return output, dict(zip(leaves, grads, strict=True)), dict(zip(leaves, rounded, strict=True))


@pytest.mark.parametrize(
    ("num_expert_sqrt", "k", "heads", "softmax"),
    [(360, 32, 4, True), (1000, 16, 8, True), (1000, 16, 8, False), (1024, 32, 4, True)],
)
@pytest.mark.parametrize(
    ("client", "routed", "options"),
    [pytest.param(PEER, OmniPEER, peer_options, id="PEER"), pytest.param(PKM, OmniPKM, pkm_options, id="PKM")],
)
def test_a_layer_computes_the_same(client, routed, options, num_expert_sqrt, k, heads, softmax, device):
    """To the last bit, except for the order of one sum: the gradient of a logit adds up those of up to k scores.
    omni_router adds from the best score down, PyTorch the rows and columns of a k × k matrix, several terms at once.
    Where the terms are rounded so that their sums are exact, the order is no matter, and all gradients are equal.
    Elsewhere they differ by less than k roundings of the largest."""
    torch.manual_seed(0)
    before, after = (layer(DIM, **options(num_expert_sqrt, k, heads, softmax)).to(device) for layer in (client, routed))
    after.load_state_dict(before.state_dict())
    tokens = tokens_without_ties(before)
    want_output, want_grads, want_rounded = results(before, tokens)
    output, grads, rounded = results(after, tokens)
    assert torch.equal(output, want_output)
    for name, want in want_rounded.items():
        assert want.any() and torch.equal(rounded[name], want), name
    for name, want in want_grads.items():
        assert (grads[name] - want).abs().max() <= k * EPS * want.abs().max(), name
