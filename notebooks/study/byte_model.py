"""The language model that notebooks 4 and 5 train: it predicts a byte from those before it."""

import pydoc_data.topics
import time

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

WINDOW = 16  # bytes that a prediction is made from


class OmniLayer(torch.nn.Module):
    """N² experts of one hidden unit each, of which a token runs k. `route` is the router."""

    def __init__(self, width, num_expert_sqrt, k, route):
        super().__init__()
        self.k, self.route = k, route
        self.gates = torch.nn.Linear(width, 2 * num_expert_sqrt, bias=False)
        self.keys = torch.nn.Parameter(torch.randn(num_expert_sqrt**2, width) * width**-0.5)
        self.values = torch.nn.Parameter(torch.randn(num_expert_sqrt**2, width))

    def forward(self, hidden):
        x, y = (logits.log_softmax(-1) for logits in self.gates(hidden).chunk(2, dim=-1))
        scores, self.chosen = self.route(x, y, self.k)
        activations = F.gelu(torch.einsum("tw,tkw->tk", hidden, self.keys[self.chosen]))
        return torch.einsum("tk,tkw->tw", scores.exp() * activations, self.values[self.chosen])


class DenseLayer(torch.nn.Module):
    """An MLP in an Omni layer's place: every token runs all hidden units. N + k of them, each with a row in and a row
    out, cost what the 2N rows of the gates and the two of each of k experts cost."""

    def __init__(self, width, hidden):
        super().__init__()
        self.into = torch.nn.Linear(width, hidden, bias=False)
        self.out = torch.nn.Linear(hidden, width, bias=False)

    def forward(self, hidden):
        return self.out(F.gelu(self.into(hidden)))


def multiply_adds(layer, width, num_tokens=4):
    """What a layer on the CPU multiplies and adds for a token in products of matrices, as PyTorch counts them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(torch.randn(num_tokens, width))
    return counter.get_total_flops() // (2 * num_tokens)


class ByteModel(torch.nn.Module):
    """A window of bytes, embedded and mixed; then blocks of a shared MLP and an Omni layer, made by `layer(width)`."""

    def __init__(self, layer, width, num_blocks=2):
        super().__init__()
        self.embedding = torch.nn.Parameter(torch.randn(256, 32))
        self.mix = torch.nn.Linear(32 * WINDOW, width)
        self.shared = torch.nn.ModuleList(self.mlp(width) for _ in range(num_blocks))
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(num_blocks))
        self.omni = torch.nn.ModuleList(layer(width) for _ in range(num_blocks))
        self.head = torch.nn.Linear(width, 256)

    @staticmethod
    def mlp(width):
        wide = torch.nn.Linear(width, 2 * width)
        return torch.nn.Sequential(torch.nn.LayerNorm(width), wide, torch.nn.GELU(), torch.nn.Linear(2 * width, width))

    def forward(self, windows):
        hidden = self.mix(self.embedding[windows].flatten(1))
        for shared, norm, omni in zip(self.shared, self.norms, self.omni, strict=True):
            hidden = hidden + shared(hidden)
            hidden = hidden + omni(norm(hidden))
        return self.head(hidden)


def steps(layer, num_steps, batch_size, device, width=128, seed=0):
    """Trains a model; after each step yields it, the step's loss, and the seconds that the step took.

    layer: makes a layer of a width. seed: of the weights to start from, and of the batches.
    """
    torch.manual_seed(seed)
    model = ByteModel(layer, width).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(seed + 1)
    text, _ = corpus(device)
    for _ in range(num_steps):
        windows, following = batch(text, batch_size, generator)
        synchronize()
        start = time.perf_counter()
        loss = F.cross_entropy(model(windows), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        number = loss.item()  # waits for the GPU
        yield model, number, time.perf_counter() - start


def train(layer, num_steps, batch_size, device, width=128, seed=0):
    """Trains a model, as `steps` does.

    layer: makes a layer; one of experts keeps those of its last call as `chosen`.

    Returns:
        The model; and a dictionary: losses, seconds and experts in use (a count a layer), lists with an entry a step;
        test_loss, on text it has not seen; peak_bytes; parameters of the layers; seed.
    """
    run = {"losses": [], "seconds": [], "experts": [], "seed": seed}
    peak_bytes(restart=True)
    for model, loss, seconds in steps(layer, num_steps, batch_size, device, width, seed):
        run["losses"].append(loss)
        run["seconds"].append(seconds)
        run["experts"].append([layer.chosen.unique().numel() for layer in model.omni if hasattr(layer, "chosen")])
    windows, following = batch(corpus(device)[1], batch_size, torch.Generator().manual_seed(0))
    with torch.no_grad():
        run["test_loss"] = F.cross_entropy(model(windows), following).item()
    run["parameters"] = sum(part.numel() for part in model.omni.parameters())
    return model, run | {"peak_bytes": peak_bytes()}


def write(model, start, length, temperature=0.6):
    """What a model writes after `start`, which is no shorter than a window."""
    generator = torch.Generator().manual_seed(0)
    written, device = list(start.encode()), model.embedding.device
    for _ in range(length):
        with torch.no_grad():
            logits = model(torch.tensor([written[-WINDOW:]], device=device))[0]
        written.append(torch.multinomial((logits / temperature).softmax(0).cpu(), 1, generator=generator).item())
    return bytes(written).decode(errors="replace")


def corpus(device):
    """The bytes of the text every Python ships: those to train on, and the last tenth to be tested on."""
    text = torch.frombuffer(bytearray("\n".join(pydoc_data.topics.topics.values()).encode()), dtype=torch.uint8)
    split = len(text) * 9 // 10
    return text[:split].long().to(device), text[split:].long().to(device)


def batch(text, size, generator):
    """`size` windows of bytes and the byte after each."""
    starts = torch.randint(len(text) - WINDOW, (size,), generator=generator).to(text.device)
    return windows_at(text, starts)


def windows_at(text, starts):
    """The windows that start at some bytes, and the byte after each."""
    return text[starts[:, None] + torch.arange(WINDOW, device=text.device)], text[starts + WINDOW]


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(restart=False):
    """The most memory PyTorch had allocated at a time since it was last restarted; nothing without a GPU."""
    if not torch.cuda.is_available():
        return 0
    if restart:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()
