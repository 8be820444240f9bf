"""The language model that notebooks 4 and 5 train: it predicts a byte from those before it."""

import pydoc_data.topics
import time

import torch
import torch.nn.functional as F

WINDOW = 16  # bytes that a prediction is made from


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


def train(layer, num_steps, batch_size, device, width=128):
    """Trains a model from a fixed seed.

    layer: makes an Omni layer of a width; the layer keeps the experts of its last call as `chosen`.

    Returns:
        The model; and a dictionary: losses, seconds and experts in use (a count a layer), lists with an entry a step;
        test_loss, on text it has not seen; peak_bytes.
    """
    torch.manual_seed(0)
    model = ByteModel(layer, width).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    text, unseen = corpus(device)
    run = {"losses": [], "seconds": [], "experts": []}
    peak_bytes(restart=True)
    for _ in range(num_steps):
        windows, following = batch(text, batch_size, generator)
        synchronize()
        start = time.perf_counter()
        loss = F.cross_entropy(model(windows), following)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run["losses"].append(loss.item())  # waits for the GPU
        run["seconds"].append(time.perf_counter() - start)
        run["experts"].append([layer.chosen.unique().numel() for layer in model.omni])
    windows, following = batch(unseen, batch_size, generator)
    with torch.no_grad():
        test_loss = F.cross_entropy(model(windows), following).item()
    return model, run | {"test_loss": test_loss, "peak_bytes": peak_bytes()}


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
