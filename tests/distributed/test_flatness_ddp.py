"""FlatnessMonitor on two gloo processes: the numbers of one process on the joint batches, and no effect on training."""

from functools import partial
from typing import Any

import pytest
import torch
from fits import difference, in_float64, joint_batches, own_share, parts
from float64_runs import fit_in_float64, network, trained
from launch import Results, Runs, launch
from lightning.pytorch import Callback

from lightning_flatlora import EFMLoRA, FlatnessMonitor
from lightning_flatlora.flatness import MEASURES

FRONT_ENDS = ["LoRA", "FMLoRA", "EFMLoRA+FMLoRAModule"]
SETTINGS = ["static_graph", "gradient_as_bucket_view", "find_unused_parameters"]


class Logged(Callback):
    """The monitor's latest numbers, after each batch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        metrics = trainer.callback_metrics
        self.rows.append({name: value.clone() for name, value in metrics.items() if name.startswith("flatness/")})


def train(
    front_end: str, accumulate: int = 1, monitored: bool = True, alone: bool = False, **strategy: Any
) -> dict[str, Any]:
    """The trained weights, and all measures every five optimizer steps, on half of each batch or on all of it."""
    net = network()
    loader, trainer = (joint_batches(), {}) if alone else (own_share(), in_float64("ddp", **strategy))
    module, callbacks, step = parts(front_end, net, accumulate)
    ema = callbacks and isinstance(callbacks[0], EFMLoRA)
    # The largest eigenvalue takes longer than all others together.
    wanted = {"ema": ema, "top_eigenvalue": front_end == "LoRA"}
    measures = [name for name in MEASURES if wanted.get(name, True)]
    monitor = FlatnessMonitor(0.3, every_n_steps=5, batches=2, measures=measures, samples=2, per_layer=True)
    logged = Logged()
    used = [*([monitor] if monitored else []), *callbacks, logged]
    fit_in_float64(module, 1, used, loader, limit_train_batches=12, **step, **trainer)
    return {"weights": trained(net), "rows": logged.rows}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    runs: Runs = {}
    for monitored in (True, False):
        for front_end in FRONT_ENDS:
            runs[f"{front_end}-{monitored}"] = partial(train, front_end, 2, monitored=monitored)
        settings = dict.fromkeys(SETTINGS, True)
        runs[f"EFMLoRA-{monitored}"] = partial(train, "EFMLoRA", monitored=monitored, **settings)
    return launch(tmp_path_factory.mktemp("flatness"), runs)


@pytest.mark.parametrize("front_end", [*FRONT_ENDS, "EFMLoRA"])
def test_training_is_that_without_it(results: Results, front_end: str) -> None:
    """Also with EFMLoRA under DDP settings that allow no backward passes besides those of training."""
    watched, plain = results[f"{front_end}-True"], results[f"{front_end}-False"]
    for one, other in zip(watched, plain, strict=True):
        assert difference(one["weights"], other["weights"]) == 0
        assert one["rows"][-1]
        assert not other["rows"][-1]


@pytest.mark.parametrize("front_end", FRONT_ENDS)
def test_all_ranks_have_the_numbers_of_one_process(results: Results, front_end: str) -> None:
    first, second = results[f"{front_end}-True"]
    alone = train(front_end, accumulate=2, alone=True)
    assert len(first["rows"]) == len(second["rows"]) == len(alone["rows"]) == 12
    assert not first["rows"][2]
    for one, other, expected in zip(first["rows"], second["rows"], alone["rows"], strict=True):
        assert one.keys() == other.keys() == expected.keys()
        for name, value in one.items():
            assert value.equal(other[name]), name
            tolerance = 2e-2 if "eigenvalue" in name else 1e-6  # Lanczos stops at a residual of 1e-2
            if "residual" not in name:  # a residual is nothing but rounding
                torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=1e-8, msg=name)
