"""The text that notebooks route, the definition that they hold results against, the tables that they print."""

import pydoc_data.topics

import torch

from omni_kernels import brute_force_router, factored_router
from omni_kernels.reference import backward_router


def text_bytes(num_tokens, start=2000):
    """Bytes of a text that ships with every Python: its language reference. One byte is one token."""
    text = "\n".join(pydoc_data.topics.topics.values()).encode()
    return torch.tensor(list(text[start : start + num_tokens]))


def text_logits(tokens, num_expert_sqrt, dtype=torch.float32, device="cpu", width=32):
    """Logits of a freshly initialised gate pair: embed each byte, project it twice, take the log-softmax.

    Made on the CPU from a fixed seed, so that every device routes the same numbers.
    """
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(256, width, generator=generator)
    gates = torch.randn(2, width, num_expert_sqrt, generator=generator) / width**0.5
    logits = (embedding[tokens] @ gates).log_softmax(-1)
    return tuple(logits.to(device, dtype))


def same_result(route, x, y, k):
    """Whether a router returns the definition's scores and indices, bit for bit."""
    got, want = route(x, y, k), brute_force_router(x, y, k)
    return "equal" if all(map(torch.equal, got, want)) else "UNEQUAL"


def show_table(rows, columns, cell):
    """Prints cell(row, column) for every pair of the values of two dictionaries, named by their keys."""
    first, width = max(map(len, rows)) + 2, max(9, *(len(name) + 2 for name in columns))
    print(" " * first + "".join(name.rjust(width) for name in columns))
    for name, row in rows.items():
        print(name.ljust(first) + "".join(str(cell(row, column)).rjust(width) for column in columns.values()))


class NeverZeroed:
    """The right gradient, added to what the buffer held before."""

    buffers = (0.0, 0.0)

    def __call__(self, grad_scores, indices, num_expert_sqrt):
        grads = backward_router(grad_scores, indices, num_expert_sqrt)
        self.buffers = tuple(map(torch.add, grads, self.buffers))
        return self.buffers


def routed(forward, backward):
    """A router with the scores and experts of `forward`, and with `backward` for its gradient."""

    class Route(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, y, k):
            scores, indices = forward(x, y, k)
            ctx.save_for_backward(indices)
            ctx.num_expert_sqrt = x.shape[1]
            ctx.mark_non_differentiable(indices)
            return scores, indices

        @staticmethod
        def backward(ctx, grad_scores, _):
            return *backward(grad_scores, ctx.saved_tensors[0], ctx.num_expert_sqrt), None

    return Route.apply


def train_next_byte(backward, num_steps=150, num_expert_sqrt=16, k=8, batch=256, width=32):
    """Trains a small mixture of experts to predict the next byte; `backward` is what turns the gradient of the scores
    into the gradients of the two logit vectors. Returns the loss of every step."""
    route = routed(factored_router, backward)
    torch.manual_seed(0)
    embedding, experts = torch.randn(256, width), torch.randn(num_expert_sqrt**2, width)
    gates, head = torch.randn(2, width, num_expert_sqrt) / width**0.5, torch.randn(width, 256) / width**0.5
    weights = [weight.requires_grad_() for weight in (embedding, experts, gates, head)]
    optimizer = torch.optim.Adam(weights, lr=0.01)
    losses = []
    for tokens in text_bytes(num_steps * batch).split(batch):
        scores, indices = route(*(embedding[tokens[:-1]] @ gates).log_softmax(-1), k)
        hidden = (scores.softmax(-1)[..., None] * experts[indices.long()]).sum(1)
        loss = torch.nn.functional.cross_entropy(hidden @ head, tokens[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
