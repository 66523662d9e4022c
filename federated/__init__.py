"""Federated learning in rounds of clients, written with drjax."""

from federated import datasets
from federated._adaptive import fedadagrad, fedadam, fedyogi
from federated._algorithm import Algorithm
from federated._analytics import histogram, mean, quantiles
from federated._artefact import Clients, load_clients
from federated._averaging import fedavg, fedprox, fedsgd
from federated._batch import Batch, batch_of
from federated._callbacks import early_stopping
from federated._data import (
    ClientData,
    from_arrays,
    from_function,
    from_mapping,
    pooled,
)
from federated._diloco import diloco
from federated._evaluation import evaluate, evaluation
from federated._export_clients import export_clients
from federated._faults import Faults, Reports
from federated._partitions import (
    dirichlet,
    hold_out,
    iid,
    label_shards,
    split_clients,
)
from federated._run import Result, run
from federated._sampling import shuffled, uniform, weighted
from federated._scaffold import scaffold
from federated._self_tuning import self_tuning_fedavg
from federated._simulate import simulate
from federated._sweep import Sweep, sweep

__all__ = [
    "Algorithm",
    "Batch",
    "ClientData",
    "Clients",
    "Faults",
    "Reports",
    "Result",
    "Sweep",
    "batch_of",
    "datasets",
    "diloco",
    "dirichlet",
    "early_stopping",
    "evaluate",
    "evaluation",
    "export_clients",
    "fedadagrad",
    "fedadam",
    "fedavg",
    "fedprox",
    "fedsgd",
    "fedyogi",
    "from_arrays",
    "from_function",
    "from_mapping",
    "histogram",
    "hold_out",
    "iid",
    "label_shards",
    "load_clients",
    "mean",
    "pooled",
    "quantiles",
    "run",
    "scaffold",
    "self_tuning_fedavg",
    "shuffled",
    "simulate",
    "split_clients",
    "sweep",
    "uniform",
    "weighted",
]
