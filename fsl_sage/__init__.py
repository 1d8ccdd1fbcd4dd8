"""Federated split learning: FSL-SAGE and SGLR, to understand, reproduce and extend. `import fsl_sage` loads no torch."""

import os as _os
from importlib import import_module as _import_module

# The threads of an operation wait for each other by asking again and again, by default for milliseconds: beside another
# process most of the time is lost so (docs/speed.md). OpenMP reads this when PyTorch is imported.
if "OMP_WAIT_POLICY" not in _os.environ:
    _os.environ.setdefault("GOMP_SPINCOUNT", "3000")

__version__ = "0.1.0"

_HOMES = {
    "config.experiment": "Experiment from_dict",
    "config.presets": "preset",
    "data.sources": "load",
    "data.partition": "partition",
    "ledger": "Ledger",
    "networks.zoo": "split_model",
    "networks.cut": "cut_layers",
    "networks.auxiliary": "auxiliary_for",
    "experiments.history": "History",
    "experiments.callbacks": "Callback",
    "experiments.train": "train_state train",
    "experiments.stored": "tidy",
    "experiments.runs": "RunStore",
    "experiments.plugins": "algorithm auxiliary dataset decoder network vocabulary",
    "experiments.plugin_files": "load_plugins",
    "papers.plots": "plot_curves",
    "papers.watch": "look watched_rounds",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> object:
    "The front door's names, each imported when it is first asked for (PEP 562)."
    if name not in _HOME:
        raise AttributeError(f"module 'fsl_sage' has no attribute {name!r}; its names are {', '.join(__all__)}")
    value = globals()[name] = getattr(_import_module(f"fsl_sage.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
