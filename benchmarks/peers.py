"""Rounds of federated averaging in PyTorch and in pfl, run by an environment of theirs.

Reads lines `WHAT MODEL` from standard input and answers each with the seconds that one
round takes: 50 clients with 50 examples, five batches of ten, plain SGD. `torch` trains
client after client and averages; `pfl` is its FederatedAveraging on the simulated
backend. Models and sizes are those of streaming.py.
"""

# Torch and pfl are not in the project's environment.
# pyright: reportMissingImports=false

import sys
import time

import numpy as np
import torch
from torch import nn
from torch.nn import functional

CLIENTS, BATCHES, BATCH = 50, 5, 10
SHAPES = {"mlp": (784,), "cnn": (3, 32, 32)}


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(784, 200), nn.Linear(200, 10)

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(x)))

    def loss(self, x, y):
        return functional.cross_entropy(self(x), y)

    def metrics(self, x, y):
        return {}


class Cnn(Mlp):
    def __init__(self):
        nn.Module.__init__(self)
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.hidden, self.out = nn.Linear(16 * 16 * 64, 128), nn.Linear(128, 10)

    def forward(self, x):
        x = functional.relu(self.b(functional.relu(self.a(x))))
        x = functional.max_pool2d(x, 2).flatten(1)
        return self.out(functional.relu(self.hidden(x)))


def data(model):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(CLIENTS, BATCHES * BATCH, *SHAPES[model], generator=generator)
    return x, torch.randint(0, 10, x.shape[:2], generator=generator)


def new_model(model):
    torch.manual_seed(0)
    return {"mlp": Mlp, "cnn": Cnn}[model]()


def torch_round(model):
    """A function that runs a round; the average becomes the model."""
    net, (x, y) = new_model(model), data(model)

    def run():
        start = {k: v.clone() for k, v in net.state_dict().items()}
        total = {k: torch.zeros_like(v) for k, v in start.items()}
        for i in range(CLIENTS):
            net.load_state_dict(start)
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            for batch in range(BATCHES):
                rows = slice(batch * BATCH, (batch + 1) * BATCH)
                optimizer.zero_grad(set_to_none=True)
                net.loss(x[i, rows], y[i, rows]).backward()
                optimizer.step()
            for k, v in net.state_dict().items():
                total[k] += v
        net.load_state_dict({k: v / CLIENTS for k, v in total.items()})

    return run


def pfl_round(model):
    """The same by pfl."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    net, (x, y) = new_model(model), data(model)
    users = [*range(CLIENTS)]
    clients = FederatedDataset(
        lambda i: Dataset([x[i], y[i]]), get_user_sampler("minimize_reuse", users)
    )
    wrapped = PyTorchModel(
        net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
    )
    backend = SimulatedBackend(training_data=clients, val_data=clients)
    train = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=0.1, local_batch_size=BATCH
    )

    def run():
        FederatedAveraging().run(
            NNAlgorithmParams(1, 10**6, CLIENTS, None),
            backend,
            wrapped,
            train,
            NNEvalHyperParams(None),
            send_metrics_to_platform=False,
        )

    return run


def main():
    np.random.seed(0)
    rounds = {}
    for line in sys.stdin:
        what, model = line.split()
        if (what, model) not in rounds:
            make = {"torch": torch_round, "pfl": pfl_round}[what]
            rounds[what, model] = make(model)
            rounds[what, model]()  # Warms up.
        start = time.perf_counter()
        rounds[what, model]()
        print("seconds", time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
